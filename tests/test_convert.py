"""`python -m titan.convert`: weights go out and come back to the bit, and what is wrong is said."""

from __future__ import annotations

import errno
import gc
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from tests.reference.hugging_face import build_hugging_face
from tests.support.command import TINY, Finished, results
from tests.support.foreign import (
    META,
    SCALING,
    SMALL,
    Payload,
    random_weights,
    rewrite_manifest,
    save_hugging_face,
    save_meta,
    save_titan,
    shape,
)
from titan.checkpoint.manifest import Manifest
from titan.checkpoint.weights import SavedTensors
from titan.config.load import load_model
from titan.config.schema import ModelConfig
from titan.convert import transfer
from titan.convert.__main__ import main

Convert = Callable[..., Finished]

SHAPES = {"plain": SMALL, "tied": shape(tie_embeddings=True), "scaled": shape(rope_scaling=SCALING, n_kv_heads=1)}
TOKENS = torch.arange(20).unsqueeze(0) * 7 % 70
TOKENIZER = {"tokenizer.json": '{"a": 1}', "tokenizer_config.json": "{}", "tokenizer.model": "words"}


@pytest.fixture
def convert(here: Path, capsys: pytest.CaptureFixture[str]) -> Convert:
    """The command, in this process and an empty folder."""

    def run(*arguments: object) -> Finished:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main([str(each) for each in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return Finished(exit.value.code or 0, out, err)  # type: ignore[arg-type]

    return run


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of each shape, in several files, with a tokenizer. To be read only."""
    folder = tmp_path_factory.mktemp("models")
    for name, config in SHAPES.items():
        save_hugging_face(folder / name, config, shard_bytes=50_000)
        for file, text in TOKENIZER.items():
            (folder / name / file).write_text(text)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints, each with an optimizer's state. To be read only."""
    run = tmp_path_factory.mktemp("saved") / "run"
    weights = random_weights(SMALL)
    optimizer = {f"{name}.exp_avg": torch.randn_like(tensor) for name, tensor in weights.items()}
    optimizer |= {f"{name}.step": torch.tensor(20.0) for name in weights}
    for step in (10, 20):
        moved = {name: tensor * (1 + step * 1e-4) for name, tensor in weights.items()}
        save_titan(run / "checkpoints" / f"step_{step:08d}", SMALL, moved, optimizer, step)
    return run


@pytest.fixture
def copied(saved: Path, here: Path) -> Path:
    """The same run, to be changed."""
    return Path(shutil.copytree(saved, here / "run"))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a Hugging Face folder."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Compare to the bit, formats too."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def titan_weights(folder: Path) -> dict[str, Tensor]:
    """Return all weights of a titan checkpoint."""
    saved = SavedTensors(folder)
    return {name: saved.read(name) for name in saved.infos()}


# Hugging Face


@pytest.mark.parametrize("name", SHAPES)
def test_there_and_back_is_the_same_to_the_bit(convert: Convert, models: Path, here: Path, name: str) -> None:
    """Hugging Face to titan to Hugging Face: every tensor, the tokenizer, and what transformers computes from it."""
    imported = convert("import", models / name, "out/checkpoint")
    assert imported.code == 0, imported.text
    assert "agrees   with the source: logits of 10 tokens to " in imported.out
    manifest = Manifest.read(here / "out/checkpoint")
    assert (manifest.step, manifest.content, manifest.run) == (0, "weights", "")
    assert {f"tokenizer/{file}" for file in TOKENIZER} <= set(manifest.files)
    assert manifest.damage(here / "out/checkpoint") == []
    assert vars(load_model(here / "out/checkpoint/config.yaml")) == {**vars(SHAPES[name]), "name": name}

    exported = convert("export", "out/checkpoint", "out/again", "--to", "hugging_face", "--max-shard-bytes", "60KB")
    assert exported.code == 0, exported.text
    assert len(list((here / "out/again").glob("*.safetensors"))) > 2
    assert_same(tensors_of(here / "out/again"), tensors_of(models / name))
    for file, text in TOKENIZER.items():
        assert (here / "out/again" / file).read_text() == text
    theirs, again = (LlamaForCausalLM.from_pretrained(path) for path in (models / name, here / "out/again"))
    assert again.generation_config.eos_token_id == theirs.generation_config.eos_token_id
    with torch.no_grad():
        torch.testing.assert_close(again(TOKENS).logits, theirs(TOKENS).logits, rtol=1e-5, atol=1e-5)
    assert [path.name for path in (here / "out").iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounded_weights_are_those_of_the_checkpoint_rounded(
    convert: Convert, saved: Path, here: Path, dtype: str
) -> None:
    """The newest checkpoint of a run, in another format: held to rounding, and the drift is reported."""
    exported = convert("export", saved, "out", "--to", "hugging_face", "--dtype", dtype)
    assert exported.code == 0, exported.text
    assert "step_00000020" in exported.out
    assert f"rounded  to {dtype}: the logits move by " in exported.out
    model = LlamaForCausalLM.from_pretrained(here / "out")
    assert model.dtype == getattr(torch, dtype)
    rounded = {
        name: tensor.to(model.dtype) for name, tensor in titan_weights(saved / "checkpoints/step_00000020").items()
    }
    with torch.no_grad():
        theirs = build_hugging_face({name: tensor.float() for name, tensor in rounded.items()}, SMALL)(TOKENS).logits
        torch.testing.assert_close(model.float()(TOKENS).logits, theirs, rtol=1e-5, atol=1e-5)


def test_half_precision_that_overflows_is_refused(convert: Convert, here: Path) -> None:
    """What float16 cannot hold would be infinite; the command says where, and nothing is left."""
    weights = random_weights(SMALL)
    weights["layers.1.feed_forward.w1.weight"][0, 0] = 1e6
    save_titan(here / "checkpoint", SMALL, weights)
    exported = convert("export", "checkpoint", "out", "--to", "hugging_face", "--dtype", "float16")
    assert exported.code == 1
    assert "they depart at layers.1, by inf" in exported.err
    assert sorted(path.name for path in here.iterdir()) == ["checkpoint"]


def test_tokens_of_a_config_are_kept(convert: Convert, models: Path, here: Path) -> None:
    """Without generation_config.json they are in config.json, of which the shape alone goes into a checkpoint."""
    shutil.copytree(models / "plain", here / "model")
    (here / "model/generation_config.json").unlink()
    content = json.loads((here / "model/config.json").read_text())
    (here / "model/config.json").write_text(json.dumps(content | {"eos_token_id": [5, 6], "bos_token_id": 4}))
    assert convert("import", "model", "checkpoint", "--no-verify").code == 0
    assert convert("export", "checkpoint", "out", "--to", "hugging_face", "--no-verify").code == 0
    model = LlamaForCausalLM.from_pretrained(here / "out")
    assert (model.config.eos_token_id, model.config.bos_token_id) == ([5, 6], 4)
    assert model.generation_config.eos_token_id == [5, 6]


# Meta


@pytest.mark.parametrize("scaled", [False, True])
def test_metas_files_are_imported_from_any_number_of_parts(convert: Convert, here: Path, scaled: bool) -> None:
    """1, 2 and 8 give the same checkpoint, which computes what transformers computes from the same weights."""
    more: dict[str, Any] = {"use_scaled_rope": True, "rope_theta": 500000.0} if scaled else {}
    weights = random_weights(META)
    for parts in (1, 2, 8):
        save_meta(here / f"meta{parts}", weights, parts, cuts_words=scaled, **more)
        imported = convert("import", f"meta{parts}", f"titan{parts}")
        assert imported.code == 0, imported.text
        assert "agrees   with the source: logits of " in imported.out
        assert ("8 is assumed" in imported.out) == scaled
        assert_same(titan_weights(here / f"titan{parts}"), weights)
    config = load_model(here / "titan8/config.yaml")
    theirs = build_hugging_face(weights, config)
    assert convert("export", "titan8", "out", "--to", "hugging_face").code == 0
    with torch.no_grad():
        ours = LlamaForCausalLM.from_pretrained(here / "out")(TOKENS).logits
        torch.testing.assert_close(ours, theirs(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_the_factor_of_scaled_positions_can_be_said(convert: Convert, here: Path) -> None:
    """Meta's files do not have it."""
    save_meta(here / "meta", random_weights(META), use_scaled_rope=True)
    imported = convert("import", "meta", "titan", "--rope-factor", "32")
    assert imported.code == 0, imported.text
    assert "assumed" not in imported.out
    scaling = load_model(here / "titan/config.yaml").rope_scaling
    assert scaling is not None
    assert scaling.factor == 32.0


# torch.save


def test_a_torch_file_takes_everything_along(convert: Convert, saved: Path, here: Path) -> None:
    """Weights, optimizer, step and tokens: out and back in, the checkpoint is the same."""
    exported = convert("export", saved, "all.pt", "--to", "torch", "--content", "all")
    assert exported.code == 0, exported.text
    content = torch.load(here / "all.pt", weights_only=True)
    assert (content["step"], content["tokens"], sorted(content)) == (
        20,
        2000,
        ["config", "model", "optimizer", "step", "tokens"],
    )
    imported = convert("import", "all.pt", "again")
    assert imported.code == 0, imported.text
    manifest = Manifest.read(here / "again")
    assert (manifest.step, manifest.tokens, manifest.content) == (20, 2000, "all")
    compared = convert("diff", saved, "again")
    assert compared.code == 0, compared.text
    assert "tensors     90 in both: 90 equal" in compared.out


def test_a_torch_file_of_weights(convert: Convert, saved: Path, here: Path) -> None:
    """Is the default, rounded if asked for; and a file without a shape takes one from the command."""
    assert convert("export", saved, "weights.pt", "--to", "torch", "--dtype", "bfloat16").code == 0
    model = torch.load(here / "weights.pt", weights_only=True)["model"]
    expected = titan_weights(saved / "checkpoints/step_00000020")
    assert_same(model, {name: tensor.bfloat16() for name, tensor in expected.items()})

    torch.save(model, here / "alone.pt")
    asked = convert("import", "alone.pt", "again")
    assert asked.code == 2
    assert "alone.pt does not say of which shape its model is\n  Try  model=llama3_8b" in asked.err
    overrides = [f"model.{key}={value}" for key, value in vars(SMALL).items() if value is not None]
    imported = convert("import", "alone.pt", "again", *overrides)
    assert imported.code == 0, imported.text
    assert load_model(here / "again/config.yaml") == SMALL
    wrong = convert("import", "alone.pt", "wrong", *overrides, "model.n_layers=4")
    assert wrong.code == 66
    assert "layers.3.attention.wq.weight is missing" in wrong.err


# Verification


def test_a_wrong_order_of_rows_is_never_kept(
    convert: Convert, models: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault that shapes do not show, planted both ways: exit code 1, the block is named, and nothing is left."""
    assert convert("import", models / "plain", "good").code == 0
    with monkeypatch.context() as patch:
        patch.setattr("titan.checkpoint.hugging_face.to_neighbours", lambda rows, head_size: rows)
        imported = convert("import", models / "plain", "out")
    monkeypatch.setattr("titan.convert.transfer.to_halves", lambda rows, head_size: rows)
    exported = convert("export", "good", "out", "--to", "hugging_face")
    for finished in (imported, exported):
        assert finished.code == 1
        assert "does not compute what its source computes: they depart at layers.0" in finished.err
        assert sorted(path.name for path in here.iterdir()) == ["good"]
    assert convert("export", "good", "out", "--to", "hugging_face", "--no-verify").code == 0


def test_a_tensor_that_was_written_wrongly_is_found(
    convert: Convert, saved: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a torch file too, where every bit counts."""
    original = transfer._Rounded.read

    def read(self: Any, name: str, *part: Any) -> Tensor:
        tensor = original(self, name, *part)
        return -tensor if name == "norm.weight" and not reads.append(name) and len(reads) == 1 else tensor

    reads: list[str] = []
    monkeypatch.setattr(transfer._Rounded, "read", read)
    exported = convert("export", saved, "out.pt", "--to", "torch")
    assert exported.code == 1
    assert "what was written is not its source, first in norm.weight" in exported.err
    assert list(here.iterdir()) == []


def test_every_row_of_the_embedding_counts(
    convert: Convert, models: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of words that the comparison's few tokens do not use."""
    original = SavedTensors.read

    def read(self: SavedTensors, name: str, *part: Any) -> Tensor:
        tensor = original(self, name, *part)
        if name == "tok_embeddings.weight":
            tensor[69, 5] += 1e-6
        return tensor

    monkeypatch.setattr(SavedTensors, "read", read)
    imported = convert("import", models / "plain", "out")
    assert imported.code == 1
    assert "what was written is not its source: tok_embeddings.weight differs" in imported.err
    assert list(here.iterdir()) == []


def test_a_full_disk_is_an_error_that_leaves_nothing(
    convert: Convert, saved: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 73, with the system's words."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("titan.checkpoint.shards.os.fsync", full)
    exported = convert("export", saved, "out", "--to", "hugging_face")
    assert exported.code == 73
    assert "out cannot be written: [Errno 28] No space left on device" in exported.err
    assert list(here.iterdir()) == []


# inspect, verify, diff


def test_inspect_says_what_is_there(convert: Convert, models: Path, saved: Path, here: Path) -> None:
    """Of every format the same facts, as text and as JSON."""
    save_meta(here / "meta", random_weights(META), 2)
    assert convert("export", saved, "all.pt", "--to", "torch", "--content", "all").code == 0
    expected = {
        saved: ("titan checkpoint", "all", 20, 60_048),
        models / "plain": ("Hugging Face folder", "weights", 0, 60_048),
        here / "all.pt": ("torch file", "all", 20, 60_048),
        here / "meta": ("Meta folder", "weights", 0, sum(each.numel() for each in random_weights(META).values())),
    }
    for path, facts in expected.items():
        found = json.loads(convert("inspect", path, "--json").out)
        assert (found["kind"], found["content"], found["step"], found["parameters"]) == facts
        assert sum(found["groups"].values()) == found["parameters"]
        assert "other" not in found["groups"]
        assert found["dtypes"] == {"float32": found["tensors"]}
        assert found["model"]["n_layers"] in (2, 3)
        text = convert("inspect", path).out
        assert f"{facts[0]}  " in text
        assert f"parameters  {facts[3]:,}" in text
    found = json.loads(convert("inspect", saved, "--json").out)
    assert (found["tokens"], found["mesh"], found["run"]) == (2000, {"dp_shard": 2}, "a run")
    assert (found["optimizer_tensors"], found["files"]) == (60, 3)
    assert found["largest"][0]["shape"] == [80, 48]
    assert "mesh        dp_shard 2" in convert("inspect", saved).out


def test_verify_names_each_damaged_file(convert: Convert, copied: Path) -> None:
    """Of one checkpoint, or of all of a run; a flipped bit, a file cut short, one that is missing, and the manifest."""
    first, second = (copied / "checkpoints" / f"step_{step:08d}" for step in (10, 20))
    whole = convert("verify", copied)
    assert whole.code == 0
    assert whole.out.count("whole: 3 files") == 2
    content = bytearray((first / "__0_0.distcp").read_bytes())
    content[1000] ^= 1
    (first / "__0_0.distcp").write_bytes(content)
    (first / "config.yaml").unlink()
    found = convert("verify", copied, second)
    assert found.code == 1
    assert "run/checkpoints/step_00000010  damaged: __0_0.distcp does not have its checksum" in found.out
    assert "run/checkpoints/step_00000010  damaged: config.yaml is missing" in found.out
    assert found.out.count("step_00000020  whole") == 2
    assert convert("verify", second).code == 0
    (second / "manifest.json").write_text((second / "manifest.json").read_text().replace("2000", "2001"))
    found = convert("verify", copied / "checkpoints")
    assert found.code == 1
    assert "step_00000020  damaged: manifest.json does not have its own checksum" in found.out


def test_verify_covers_the_tokenizer(convert: Convert, models: Path, here: Path) -> None:
    """Files in folders of a checkpoint have checksums too."""
    assert convert("import", models / "plain", "checkpoint", "--no-verify").code == 0
    (here / "checkpoint/tokenizer/tokenizer.json").write_text('{"a": 2}')
    found = convert("verify", "checkpoint")
    assert found.code == 1
    assert "damaged: tokenizer/tokenizer.json does not have its checksum" in found.out
    exported = convert("export", "checkpoint", "out", "--to", "hugging_face")
    assert exported.code == 66
    assert "tokenizer/tokenizer.json does not have its checksum" in exported.err


def test_what_has_no_checksums_cannot_be_verified(convert: Convert, models: Path, here: Path) -> None:
    """Another format, an empty folder, nothing at all: exit code 66."""
    for path, words in (
        (models / "plain", "is no titan checkpoint"),
        (here, "it has no manifest"),
        ("no", "not there"),
    ):
        found = convert("verify", path)
        assert found.code == 66
        assert words in found.err


def test_diff_across_formats(convert: Convert, models: Path, here: Path) -> None:
    """The same weights are the same in every format, by titan's names."""
    assert convert("import", models / "tied", "titan").code == 0
    assert convert("export", "titan", "file.pt", "--to", "torch").code == 0
    for other in ("titan", "file.pt"):
        found = convert("diff", models / "tied", other)
        assert found.code == 0, found.text
        assert "tensors     29 in both: 29 equal, 0 within 0, 0 apart\nverdict     the same" in found.out


def test_diff_says_how_far(convert: Convert, saved: Path) -> None:
    """Two steps of a run: the worst tensors with absolute and relative difference; a tolerance forgives."""
    first, second = (saved / "checkpoints" / f"step_{step:08d}" for step in (10, 20))
    found = convert("diff", first, second)
    assert found.code == 1
    assert found.out.count("apart       ") == 10
    assert "            ... and 20 more" in found.out
    assert "1.0e-03 of the largest number, in 3,840 of 3,840" in found.out
    assert "note        step 10 and step 20" in found.out
    assert "tensors     90 in both: 60 equal, 0 within 0, 30 apart\nverdict     different" in found.out
    assert convert("diff", first, second, "--tolerance", "2e-3").code == 0


def test_diff_says_what_only_one_has(convert: Convert, saved: Path, here: Path) -> None:
    """Tensors, shapes, formats, keys of the config, an optimizer's state: each has its line."""
    deeper = shape(n_layers=4, ffn_dim=96, name="deeper", rope_theta=1e6)
    save_titan(here / "deeper", deeper, {name: each.bfloat16() for name, each in random_weights(deeper).items()})
    found = convert("diff", saved, "deeper")
    assert found.code == 1
    for line in (
        "note        only the first has an optimizer's state",
        "config      model.name = small and deeper (changes nothing)",
        "config      model.n_layers = 3 and 4",
        "config      model.rope_theta = 10000.0 and 1000000.0",
        "only second layers.3.attention.wq.weight",
        "shape       layers.0.feed_forward.w1.weight: [80, 48] and [96, 48]",
        "format      float32 and bfloat16: 21 tensors",
    ):
        assert line in found.out, line
    assert convert("diff", "deeper", "deeper").code == 0


def test_diff_of_what_is_no_number(convert: Convert, here: Path) -> None:
    """NaN in the same place of both is the same; in one of them it is infinitely far."""
    weights = random_weights(SMALL)
    save_titan(here / "a", SMALL, weights)
    weights["norm.weight"][3] = float("nan")
    save_titan(here / "b", SMALL, weights)
    assert convert("diff", "b", "b").code == 0
    found = convert("diff", "a", "b", "--tolerance", "1e9")
    assert found.code == 1
    assert "apart       norm.weight  inf at most, inf of the largest number, in 1 of 48\n" in found.out


# Mistakes


@pytest.mark.parametrize("command", [["import"], ["export", "--to", "torch"], ["export", "--to", "hugging_face"]])
def test_nothing_is_overwritten(convert: Convert, saved: Path, models: Path, here: Path, command: list[str]) -> None:
    """A destination that is there is refused before anything is read, even if it is a link to nothing."""
    (here / "file").write_text("mine")
    (here / "folder").mkdir()
    (here / "link").symlink_to("nowhere")
    source = models / "plain" if command == ["import"] else saved
    for name in ("file", "folder", "link"):
        found = convert(*command, source, name)
        assert found.code == 2
        assert f"{name} is there already\n  Try  another name" in found.err
    assert (here / "file").read_text() == "mine"


MISTAKES: dict[str, tuple[list[str], int, str]] = {
    "a source that is not there": (
        ["import", "{here}/none", "out"],
        66,
        "none: there is no such directory\n  . has: empty\n  Try  a run directory, a checkpoint of one, or",
    ),
    "a name that is nearly one": (
        ["export", "empty/checkpoint", "out", "--to", "torch"],
        66,
        "empty/checkpoint: there is no such directory\n  empty has: checkpoints\n  Try  empty/checkpoints",
    ),
    "a folder in a file": (
        ["inspect", "{models}/plain/config.json/a"],
        66,
        "config.json/a: there is no such directory",
    ),
    "a run where there are none": (["inspect", "runs/nope"], 66, "runs/nope: there is no such directory"),
    "a name on the hub": (
        ["import", "meta-llama/Llama-3.1-8B", "out"],
        66,
        "is not there\n  Try  hf download meta-llama/Llama-3.1-8B --local-dir FOLDER",
    ),
    "an empty folder": (["import", "{here}", "out"], 66, "It is none of: a titan checkpoint (manifest.json)"),
    "a file of another kind": (["inspect", "{models}/plain/config.json"], 66, "is one file of a folder\n  Try  "),
    "a text": (["inspect", "{models}/plain/tokenizer.model"], 66, "tokenizer.model cannot be read"),
    "a run without checkpoints": (["inspect", "{here}/empty"], 66, "empty/checkpoints has no checkpoint"),
    "titan into titan": (["import", "{saved}", "out"], 2, "is a titan checkpoint already\n  Try  checkpoint.initial"),
    "others into others": (
        ["export", "{models}/plain", "out", "--to", "torch"],
        2,
        "is no titan checkpoint but a Hugging Face folder\n  Try  python -m titan.convert import",
    ),
    "an optimizer for transformers": (
        ["export", "{saved}", "out", "--to", "hugging_face", "--content", "all"],
        2,
        "--content all is for --to torch",
    ),
    "shards of one file": (
        ["export", "{saved}", "out", "--to", "torch", "--max-shard-bytes", "5GB"],
        2,
        "torch.save makes one file",
    ),
    "a shape for what has one": (
        ["import", "{models}/plain", "out", "model.dim=4"],
        2,
        "model.dim=4: a Hugging Face folder says itself of which shape it is",
    ),
    "a factor for what has one": (["import", "{models}/plain", "out", "--rope-factor", "8"], 2, "is for a Meta folder"),
    "no format": (["export", "{saved}", "out"], 2, "the following arguments are required: --to"),
    "no command": ([], 2, "the following arguments are required: COMMAND"),
    "a size of nothing": (
        ["export", "{saved}", "out", "--to", "hugging_face", "--max-shard-bytes", "many"],
        2,
        "many is no size such as 500MB or 2GiB",
    ),
    "a tolerance below zero": (["diff", "{saved}", "{saved}", "--tolerance", "-1"], 2, "-1 is no share such as 1e-5"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_said(convert: Convert, models: Path, saved: Path, here: Path, name: str) -> None:
    """With what to type where there is something to type; and nothing is written."""
    arguments, code, words = MISTAKES[name]
    (here / "empty/checkpoints").mkdir(parents=True)
    places = {"here": here, "models": models, "saved": saved}
    found = convert(*(each.format(**places) for each in arguments))
    assert found.code == code, found.text
    assert words in found.err
    assert not (here / "out").exists()


def test_a_torch_file_without_an_optimizer_has_no_all(convert: Convert, here: Path) -> None:
    """The error says what to ask for instead."""
    save_titan(here / "titan", SMALL, random_weights(SMALL))
    found = convert("export", "titan", "out", "--to", "torch", "--content", "all")
    assert (found.code, "titan has no optimizer state\n  Try  --content weights" in found.err) == (2, True)


@pytest.mark.parametrize("damage", ["a shard", "a tensor", "a truncated shard"])
def test_an_incomplete_model_is_not_imported(convert: Convert, models: Path, here: Path, damage: str) -> None:
    """No value is ever made up for one that is missing."""
    shutil.copytree(models / "plain", here / "model")
    path = sorted((here / "model").glob("*.safetensors"))[1]
    if damage == "a shard":
        path.unlink()
    elif damage == "a tensor":
        index = json.loads((here / "model/model.safetensors.index.json").read_text())
        index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = path.name
        (here / "model/model.safetensors.index.json").write_text(json.dumps(index))
    else:
        path.write_bytes(path.read_bytes()[:-100])
    found = convert("import", "model", "out")
    assert found.code == 66
    assert path.name in found.err
    assert sorted(each.name for each in here.iterdir()) == ["model"]


def _edit_manifest(folder: Path) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    content["manifest"]["files"]["__0_0.distcp"] = 3
    (folder / "manifest.json").write_text(json.dumps(content))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a manifest of nothing": (
        lambda folder: (folder / "manifest.json").write_text("{}"),
        "manifest.json cannot be read",
    ),
    "a manifest that was changed": (_edit_manifest, "manifest.json does not have its own checksum"),
    "a missing file": (lambda folder: (folder / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "a short file": (lambda folder: (folder / "__0_0.distcp").write_bytes(b"short"), "has 5 bytes instead of"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_not_used(convert: Convert, copied: Path, name: str) -> None:
    """By any command that opens it."""
    damage, words = DAMAGE[name]
    folder = copied / "checkpoints/step_00000020"
    damage(folder)
    for command in (["inspect", folder], ["export", copied, "out", "--to", "torch"], ["diff", folder, folder]):
        found = convert(*command)
        assert found.code == 66, found.text
        assert words in found.err


# Safety


def test_nothing_in_a_checkpoint_is_run(convert: Convert, copied: Path, here: Path) -> None:
    """Metadata and data that would run a command when they are unpickled, in a checkpoint whose checksums fit."""
    import pickle

    folder, marker = copied / "checkpoints/step_00000020", here / "ran"
    data = (folder / "__0_0.distcp").read_bytes()
    torch.save(Payload(marker), folder / "__0_0.distcp")
    planted = (folder / "__0_0.distcp").read_bytes()
    (folder / "__0_0.distcp").write_bytes((planted + data)[: max(len(planted), len(data))])
    rewrite_manifest(folder)
    assert convert("export", copied, "out", "--to", "torch").code == 66
    (folder / ".metadata").write_bytes(pickle.dumps(Payload(marker)))
    rewrite_manifest(folder)
    for command in (["inspect", folder], ["export", folder, "out", "--to", "hugging_face"]):
        found = convert(*command)
        assert found.code == 66
        assert "posix.system, which is no part of a checkpoint's metadata" in found.err
    assert not marker.exists()


def test_nothing_in_others_files_is_run(convert: Convert, here: Path) -> None:
    """Nor in Meta's files and those of torch.save."""
    save_meta(here / "meta", random_weights(META), 2)
    torch.save({"norm.weight": Payload(here / "ran")}, here / "meta/consolidated.01.pth")
    torch.save({"model": {"a": torch.ones(2)}, "more": Payload(here / "ran")}, here / "file.pt")
    for source in ("meta", "file.pt"):
        for command in (["import", source, "out"], ["inspect", source]):
            found = convert(*command)
            assert found.code == 66
            assert "what it asks for was not run" in found.err
    assert not (here / "ran").exists()


def test_the_code_that_a_config_names_is_not_imported(convert: Convert, here: Path) -> None:
    """A model's family may be any module, which to import is to run; a checkpoint of one can be looked at."""
    (here / "evil.py").write_text("open('ran', 'w')")
    save_titan(here / "titan", shape(family="evil:FAMILY"), random_weights(SMALL))
    assert convert("inspect", "titan").code == 0
    found = convert("export", "titan", "out", "--to", "hugging_face")
    assert found.code == 66
    assert "model.family = evil:FAMILY: other formats know titan's own families only: llama" in found.err
    assert not (here / "ran").exists()


# A run


@pytest.mark.slow
def test_a_trained_run_goes_out_and_is_trained_on(
    convert: Convert, trained: Path, here: Path, titan_process: Callable[..., Finished], text_file: Path
) -> None:
    """Its newest checkpoint as a Hugging Face folder, from which another run starts at the loss where it ended."""
    exported = convert("export", trained, "model", "--to", "hugging_face")
    assert exported.code == 0, exported.text
    imported = convert("import", "model", "checkpoint")
    assert imported.code == 0, imported.text
    found = convert("diff", trained, "checkpoint")
    assert found.code == 0, found.text
    same = [*TINY, f"data.path={text_file}", "metrics.log_every=1", "training.steps=1", "optimizer.lr=1e-30"]
    for name in ("model", "checkpoint"):
        finished = titan_process(*same, f"run.dir=from_{name}", f"checkpoint.initial_load={name}")
        assert finished.code == 0, finished.text
    losses = [results(here / f"from_{name}")[0][1] for name in ("model", "checkpoint")]
    assert losses[0] == losses[1]
    assert losses[0] < results(trained)[0][1]


# Memory


class PeakMemory:
    """The most memory of its own that this process had, beyond what it began with; pages of files do not count."""

    def __enter__(self) -> PeakMemory:
        gc.collect()
        self.begin = self.peak = self._now()
        self.is_over = False
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_over = True
        self.thread.join()

    @property
    def mib(self) -> float:
        """In MiB."""
        return (self.peak - self.begin) / 2**20

    def _watch(self) -> None:
        while not self.is_over:
            self.peak = max(self.peak, self._now())
            time.sleep(0.0005)

    @staticmethod
    def _now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


@pytest.fixture(scope="module")
def wide() -> ModelConfig:
    """225 MiB in float32: 56 matrices of 4 MiB."""
    return shape(dim=1024, n_heads=8, n_kv_heads=8, ffn_dim=1024, n_layers=8)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small models are fastest on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_tensors_go_through_memory_one_at_a_time(convert: Convert, here: Path, wide: ModelConfig) -> None:
    """Of 225 MiB, each command holds some tensors; with verification, a block of both sides (56 MiB) more."""
    save_hugging_face(here / "model", wide)
    commands = [
        (["import", "model", "titan", "--no-verify"], 40),
        (["export", "titan", "fast", "--to", "hugging_face", "--no-verify"], 60),
        (["export", "titan", "file.pt", "--to", "torch"], 60),
        (["import", "file.pt", "again"], 40),
        (["diff", "titan", "fast"], 70),
        (["import", "model", "checked"], 90),
        (["export", "titan", "out", "--to", "hugging_face", "--dtype", "bfloat16"], 110),
    ]
    for command, limit in commands:
        with PeakMemory() as memory:
            finished = convert(*command)
        print(f"{' '.join(command)}: {memory.mib:.0f} MiB")
        assert finished.code == 0, finished.text
        assert memory.mib < limit, command
