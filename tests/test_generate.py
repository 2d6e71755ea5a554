"""The command for text, as a user types it: what it says, to whom, and what it refuses in which words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaForCausalLM

from titan.checkpoint.manifest import step_folder
from titan.generate.__main__ import main
from titan.generate.continuation import encode_prompts, go_on
from titan.generate.model import load_model
from titan.generate.options import GenerateOptions, option_keys, read_options
from titan.generate.source import open_speaker

from .data.vocabulary import write_json_tokenizer
from .parallel.pool import RankPool
from .support.command import Finished
from .support.foreign import SCALING, random_weights, save_hugging_face, save_titan, shape

Generate = Callable[..., Finished]
MODEL = shape(vocab_size=480, rope_scaling=SCALING, max_seq_len=256)
PROMPTS = ["The quick", "x", "The quick brown fox jumps over the lazy dog. " * 3]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A token at a time is too little work for several threads, which only wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def generate(here: Path, capsys: pytest.CaptureFixture[str]) -> Generate:
    """The command, in this process and an empty folder."""

    def run(*arguments: str) -> Finished:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        out, err = capsys.readouterr()
        return Finished(exit.value.code or 0, out, err)  # type: ignore[arg-type]

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with grouped queries, scaled rotary positions and a tokenizer of fewer tokens."""
    path = tmp_path_factory.mktemp("model")
    save_hugging_face(path, MODEL)
    return write_json_tokenizer(path)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A titan checkpoint without a run: weights and shape alone."""
    config = replace(MODEL, vocab_size=258, max_seq_len=64)
    save_titan(tmp_path / "weights", config, random_weights(config))
    return tmp_path / "weights"


def transformers_says(folder: Path, prompts: list[list[int]], words: int, ends: list[int]) -> list[list[int]]:
    """Return what the transformers library puts behind each prompt, by itself, out of so many words."""
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    found = []
    for prompt in prompts:
        row = torch.tensor([prompt])
        out = model.generate(
            row,
            attention_mask=torch.ones_like(row),
            max_new_tokens=16,
            do_sample=False,
            suppress_tokens=list(range(words, MODEL.vocab_size)),
            eos_token_id=ends,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        found.append(out[:-1] if out[-1] in ends else out)
    return found


def test_a_hugging_face_folder_says_what_transformers_says(generate: Generate, folder: Path) -> None:
    """Greedily, prompts of different lengths together; the end of a text is that of the files beside the weights."""
    options = read_options([f"checkpoint={folder}", "prompt=x"])
    speaker = open_speaker(options, print)
    rows = [row.prompt_tokens for row in encode_prompts(PROMPTS, speaker, options)]
    free = transformers_says(folder, rows, speaker.tokenizer.n_tokens, [479])
    ends = [free[0][5], speaker.tokenizer.eos, 2]  # in the midst of what it would say
    expected = transformers_says(folder, rows, speaker.tokenizer.n_tokens, ends)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    prompts = f"prompt={json.dumps(PROMPTS)}"
    found = generate(f"checkpoint={folder}", prompts, "max_new_tokens=16", "--json")
    said = [json.loads(line) for line in found.out.splitlines()]
    assert found.code == 0, found.text
    assert [(row["prompt"], row["tokens"]) for row in said] == list(zip(PROMPTS, expected, strict=True))
    assert said[0]["ended"] == "end of text"
    assert [row["text"] for row in said] == [
        speaker.tokenizer.decode([*prompt, *tokens])[len(speaker.tokenizer.decode(prompt)) :]
        for prompt, tokens in zip(rows, expected, strict=True)
    ]
    further = generate(f"checkpoint={folder}", prompts, "max_new_tokens=16", "stop_at_end=false", "batch_size=2")
    assert further.out.count("--- ") == 3
    assert further.out.startswith(f"--- 1/3\n{PROMPTS[0]}{said[0]['text']}")
    assert len(further.out) > len("".join(row["prompt"] + row["text"] for row in said))


def test_a_run_speaks_with_its_newest_checkpoint_that_is_whole(
    generate: Generate, trained: Path, tmp_path: Path
) -> None:
    """With its own tokenizer; a damaged one is passed over and told, and is an error where it was named itself."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    words = ("prompt=the quick", "max_new_tokens=12")
    said = generate(f"checkpoint={run}", *words)
    assert (said.code, said.out[:9]) == (0, "the quick"), said.text
    assert generate(f"checkpoint={step_folder(run / 'checkpoints', 2)}", *words).out == said.out
    damaged = step_folder(run / "checkpoints", 3)
    shutil.copytree(step_folder(run / "checkpoints", 2), damaged)
    tensors = damaged / "__0_0.distcp"
    content = bytearray(tensors.read_bytes())
    content[-9] ^= 1
    tensors.write_bytes(content)
    again = generate(f"checkpoint={run}", *words)
    assert again.out == said.out
    assert "step_00000003 is damaged and passed over: __0_0.distcp does not have its checksum" in again.err
    named = generate(f"checkpoint={damaged}", *words)
    assert (named.code, named.out) == (66, "")
    assert "__0_0.distcp does not have its checksum" in named.err


def test_the_same_seed_says_the_same_alone_and_together(generate: Generate, checkpoint: Path) -> None:
    """What a prompt draws does not depend on the others; another seed says something else."""
    drawn = (f"checkpoint={checkpoint}", "tokenizer=bytes", "max_new_tokens=20", "temperature=1.5", "--json")
    several = generate(*drawn, "prompt=[one,a second one]", "seed=3").out.splitlines()
    alone, other = (generate(*drawn, "prompt=one", f"seed={seed}").out for seed in (3, 4))
    assert json.loads(alone)["tokens"] == json.loads(several[0])["tokens"]
    assert json.loads(other)["tokens"] != json.loads(alone)["tokens"]
    greedy = generate(*drawn[:3], "prompt=one", "--json").out
    narrow = generate(*drawn, "prompt=one", "top_k=1").out
    assert json.loads(narrow)["tokens"] == json.loads(greedy)["tokens"] != json.loads(alone)["tokens"]


def test_prompts_come_from_files(generate: Generate, checkpoint: Path, here: Path) -> None:
    """A line each, or an object each; blank lines do not count."""
    (here / "prompts.txt").write_text("one\n\n[two, three]\n")
    (here / "prompts.jsonl").write_text('{"prompt": "a\\nb"}\n\n{"prompt": ""}\n')
    common = (f"checkpoint={checkpoint}", "tokenizer=bytes", "max_new_tokens=2", "--json")
    for name, expected in (("prompts.txt", ["one", "[two, three]"]), ("prompts.jsonl", ["a\nb", ""])):
        found = generate(*common, f"prompts_file={name}")
        assert [json.loads(line)["prompt"] for line in found.out.splitlines()] == expected


def test_a_text_ends_where_the_context_does(generate: Generate, checkpoint: Path) -> None:
    """Each row at its own place, and the output says why."""
    found = generate(
        *(f"checkpoint={checkpoint}", "tokenizer=bytes", "max_new_tokens=60", "stop_at_end=false", "--json"),
        f"prompt=[{'x' * 50},{'x' * 20}]",
    )
    said = [json.loads(line) for line in found.out.splitlines()]
    assert [(row["prompt_tokens"], len(row["tokens"]), row["ended"]) for row in said] == [
        (51, 13, "context"),
        (21, 43, "context"),
    ]
    assert "ended by context (2)" in found.err


MISTAKES = [
    (["checkpoint=none", "prompt=x"], 66, "none: there is no such directory"),
    (["checkpoint=new_run/nope", "prompt=x"], 66, "new_run has: checkpoints\n  Try  a run directory, a checkpoint of"),
    (["checkpoint=new_rum", "prompt=x"], 66, "Try  new_run"),
    (["checkpoint=meta-llama/Llama-3.2-1B", "prompt=x"], 66, "Try  hf download meta-llama/Llama-3.2-1B --local-dir"),
    (["checkpoint=empty", "prompt=x"], 66, "empty cannot be used: it is empty"),
    (["checkpoint=new_run", "prompt=x"], 66, "new_run cannot be used: this run has no checkpoint yet"),
    (["checkpoint=bare", "prompt=x"], 2, "bare has no tokenizer"),
    (["checkpoint=bare", "prompt=x", "tokenizer=huggingface"], 2, "tokenizer = huggingface reads a file"),
    (["checkpoint=bare", "prompt=x", "tokenizer.path=none"], 2, "tokenizer.path = none has no tokenizer"),
    (["checkpoint=small", "prompt=x", "tokenizer=bytes"], 2, "has 258 tokens, and the model only 70 rows"),
    (["checkpoint=bare", f"prompt={'x' * 64}", "tokenizer=bytes"], 2, "has 65 tokens, and the model's context is 64"),
    (["checkpoint=bare", "prompt=", "begin_text=false", "tokenizer=bytes"], 2, "the prompt is empty"),
    (["checkpoint=bare", "prompt=x", "tokenizer=bytes", "tp=3"], 2, "tp = 3 does not divide the model's n_kv_heads"),
    (["checkpoint=bare", "prompt=x", "tokenizer=bytes", "device=cuda"], 2, "device = cuda, but PyTorch sees 0"),
    (["checkpoint=damaged", "prompt=x", "tokenizer=bytes"], 66, "does not have its checksum"),
    (["checkpoint=short", "prompt=x"], 66, "is no whole safetensors file"),
    (["checkpoint=bare", "prompt=x", "temperature=-0.5"], 2, "temperature = -0.5 is not a number from 0 on"),
    (["checkpoint=bare", "prompt=x", "temperature=nan"], 2, "temperature = nan is not a number from 0 on"),
    (["checkpoint=bare", "prompt=x", "temperature=1", "top_p=0"], 2, "top_p = 0 is not above 0 and at most 1"),
    (["checkpoint=bare", "prompt=x", "top_p=0.5"], 2, "Try  temperature=1 top_p=0.5"),
    (["checkpoint=bare", "prompt=x", "top_k=two"], 2, "top_k = two is not a whole number"),
    (["checkpoint=bare", "prompt=x", "dtype=float64"], 2, "There are: auto, float32, bfloat16"),
    (["checkpoint=bare", "prompt=x", "tempreature=1"], 2, "Try  temperature=1"),
    (["checkpoint=bare", "prompt=x", "prompt=y"], 2, "prompt is given twice"),
    (["checkpoint=bare", "prompt"], 2, "prompt has no value"),
    (["checkpoint=bare"], 2, "prompt is not set"),
    (["prompt=x"], 2, "checkpoint is not set"),
    (["checkpoint=bare", "prompts_file=none"], 2, "prompts_file = none cannot be read: No such file"),
    (["checkpoint=bare", "prompts_file=bad.jsonl"], 2, "line 2 is not an object"),
    (["checkpoint=bare", "prompt=x", "max_new_tokens=0"], 2, "max_new_tokens = 0 is below 1"),
]


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the mistakes below are about."""
    here = tmp_path_factory.mktemp("wrong")
    config = replace(MODEL, vocab_size=258, max_seq_len=64)
    for name in ("bare", "damaged"):
        save_titan(here / name, config, random_weights(config))
    tensors = here / "damaged" / "__0_0.distcp"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"?")
    save_hugging_face(here / "small")
    save_hugging_face(here / "short")
    weights = here / "short" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    (here / "empty").mkdir()
    (here / "new_run" / "checkpoints").mkdir(parents=True)
    (here / "bad.jsonl").write_text('{"prompt": "x"}\n{"text": "x"}\n')
    return here


@pytest.mark.parametrize(("arguments", "code", "words"), MISTAKES, ids=lambda each: str(each)[:60])
def test_a_mistake_is_told(
    generate: Generate,
    wrong: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    """In its own words, with its exit code, and with nothing on standard output."""
    monkeypatch.chdir(wrong)
    found = generate(*arguments)
    assert (found.code, found.out) == (code, ""), found.text
    assert words in found.err
    assert "Traceback" not in found.err


def test_help_shows_every_key(generate: Generate) -> None:
    """With what it takes and what it says."""
    shown = generate("--help").out
    for name in option_keys():
        assert f"\n  {name}=" in shown
    assert "Tokens after each prompt, at most." in shown


def say_on_ranks(folder: Path, tp: int) -> list[list[int]]:
    """Return what a model says that is shared by the ranks of a pool."""
    mesh = init_device_mesh("cpu", (tp,)) if tp > 1 else None
    options = GenerateOptions(checkpoint=str(folder), max_new_tokens=12, temperature=1.0, tp=tp)
    speaker = open_speaker(options, print)
    rows = encode_prompts(PROMPTS, speaker, options)
    model = load_model(speaker, 200, torch.device("cpu"), torch.float32, mesh)
    for _ in go_on(model, rows, speaker, options):
        pass
    return [row.tokens for row in rows]


def test_two_ranks_say_what_one_says(pools: Callable[[int], RankPool], folder: Path) -> None:
    """Tensor parallelism changes no token, and no rank says another."""
    one = pools(1).run(say_on_ranks, folder, 1)
    assert pools(2).run(say_on_ranks, folder, 2) == one * 2
    assert any(one[0])


@pytest.mark.slow
def test_the_command_starts_the_ranks_itself(titan_process: Callable[..., Finished], folder: Path) -> None:
    """One text, on standard output, by one of them."""
    words = (f"checkpoint={folder}", "prompt=The quick", "max_new_tokens=12")
    one, two = (titan_process(*words, f"tp={tp}", module="titan.generate") for tp in (1, 2))
    assert (two.code, two.out) == (0, one.out), two.text
    assert one.out.startswith("The quick")


def test_options_survive_the_way_to_the_ranks() -> None:
    """As JSON and back."""
    from titan.generate.ranks import _read

    options = read_options(["checkpoint=a", "prompt=[b,c]", "tokenizer=bytes", "dtype=bfloat16", "tp=2"])
    given = {key: getattr(value, "name", value) for key, value in asdict(options).items()}
    assert _read(json.loads(json.dumps(given))) == options
