"""titan.prepare: the whole way from a command line to data that is trained on, shown, verified and replayed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from titan.config.check import check_config
from titan.config.degrees import Machine
from titan.config.load import compose, save_config
from titan.data.mixture import MixtureRows, load_rows
from titan.data.tokenizer import build_tokenizer
from titan.errors import CommandError, ConfigError, DataError
from titan.prepare import __main__ as command
from titan.prepare import make, replay, show

SMALL = ["training.seq_len=32", "training.local_batch_size=4", "training.steps=20", "cluster.device=cpu"]


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    """Two sources, as overrides of a mixture."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(300)))
    (tmp_path / "b").mkdir()
    for number in range(5):
        (tmp_path / "b" / f"{number}.txt").write_text(f"file {number} " * 60)
    return [
        "data=mixture",
        f"+data.components.lines={{kind:jsonl,path:{tmp_path}/a.jsonl,weight:3}}",
        f"+data.components.files={{kind:text,path:{tmp_path}/b,weight:1}}",
        f"data.cache_dir={tmp_path}/cache",
    ]


def run_of(folder: Path, overrides: list[str]) -> Path:
    """Freeze the config of a run that was never started."""
    folder.mkdir()
    config = check_config(compose([*SMALL, f"run.dir={folder}", *overrides]), Machine(cache_dir=str(folder / "cache")))
    save_config(config, folder / "config.yaml")
    return folder


def test_a_mixture_is_prepared_shown_verified_and_found(
    tmp_path: Path, sources: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """What --to wrote has the rows that the sources themselves give, and every command reads it."""
    to = tmp_path / "to"
    assert make.main([*sources, "--to", str(to)])
    assert show.verify_main([str(to)])
    assert "files: 3 files are as their checksums say" in capsys.readouterr().out
    assert show.main([str(to), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["lines"]["documents"] == 300
    assert told["files"]["documents"] == 5
    rows = []
    for name, overrides in (("run_a", sources), ("run_b", ["data=prepared", f"data.path={to}"])):
        run = run_of(tmp_path / name, overrides)
        config = replay.load_config(run / "config.yaml")
        rows.append(replay.load_run_rows(config, build_tokenizer(config.tokenizer)))
    assert isinstance(rows[0], MixtureRows)
    assert rows[0].digest == rows[1].digest
    orders = [each.order(4, 0) for each in rows]
    assert all((orders[0].rows_of_step(s) == orders[1].rows_of_step(s)).all() for s in range(50))
    lines = rows[0].describe_shares(80)
    assert lines[0].startswith("files: 25.00% of the rows, 20 of ")
    assert lines[1].startswith("lines: 75.00% of the rows, 60 of ")
    (to / "files" / "part_00000.tokens").write_bytes(bytes((to / "files" / "part_00000.tokens").stat().st_size))
    assert not show.verify_main([str(to)])


def test_training_finds_what_was_prepared_into_the_cache(
    sources: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --to the tokens are where the same overrides look for them: nothing is read a second time."""
    assert make.main(sources)
    assert "trained on with  the same overrides" in capsys.readouterr().out
    data, tokenizer = make.load(sources)
    monkeypatch.setattr("titan.data.shard.Shard.read", lambda *_: pytest.fail("read again"))
    preparation = make.Preparation(build_tokenizer(tokenizer), str(data.cache_dir), is_writer=False)
    assert len(load_rows(data, 32, preparation)) > 100


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_replay_prints_the_documents_of_a_step(
    tmp_path: Path, sources: list[str], packing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every row's text is found in its source's record; a digest that the run wrote down is held against it."""
    run = run_of(tmp_path / "run", [*sources, f"data.packing={packing}"])
    assert replay.main([str(run), "--step", "7", "--json"])
    told = json.loads(capsys.readouterr().out)
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert [row["row"] for row in told["rows"]] == [0, 1, 2, 3]
    lines_told = {piece["where"] for row in told["rows"] for piece in row["pieces"] if piece["component"] == "lines"}
    assert all(f"a.jsonl, line {number + 1}" in where for number, where in _numbered(lines_told))
    for piece in (piece for row in told["rows"] for piece in row["pieces"]):
        if piece["component"] == "lines":
            source = json.loads(lines[piece["record"]])["text"]
        else:
            source = Path(piece["shard"]).read_text()
        whole = f"<|begin_of_text|>{source}<|end_of_text|>"
        assert piece["text"] in whole
    assert replay.main([str(run), "--step", "7", "--rows", "2", "--whole"])
    out = capsys.readouterr().out
    assert "row 2 " in out
    assert "row 1 " not in out
    assert "the run has written down none" in out
    (run / "data.jsonl").write_text(json.dumps({"step": 7, "digest": told["digest"]}) + "\n")
    assert replay.main([str(run), "--step", "7"])
    (run / "data.jsonl").write_text(json.dumps({"step": 7, "digest": "0" * 32}) + "\n")
    assert not replay.main([str(run), "--step", "7"])


def _numbered(places: set[str]) -> list[tuple[int, str]]:
    """Return each place with the number that its line's document has in its text."""
    return [(int(place.rpartition(" ")[2]) - 1, place) for place in places]


def test_replay_says_what_cannot_be_replayed(tmp_path: Path, sources: list[str]) -> None:
    """A folder that is no run, a step or a row that there is not: each with what to type."""
    run = run_of(tmp_path / "run", sources)
    for arguments, words in (
        ([str(tmp_path), "--step", "1"], "is not a run"),
        ([str(run), "--step", "0"], r"1 to 20(.|\n)*--step 1"),
        ([str(run), "--step", "21"], r"1 to 20(.|\n)*--step 20"),
        ([str(run), "--step", "1", "--rows", "4"], "0 to 3"),
        ([str(run), "--step", "1", "--rows", "x"], "0 to 3"),
    ):
        with pytest.raises(CommandError, match=words):
            replay.main(arguments)


def test_exit_codes_are_those_of_the_contracts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """0 done, 2 a wrong command or config, 65 a bad folder or document; never a traceback."""

    def code(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["titan.prepare", *arguments])
        return command.main()

    bad = tmp_path / "bad.jsonl"
    bad.write_text("{\n")
    to = str(tmp_path / "to")
    assert code("--help") == 0
    assert code("data=jsonl", f"data.path={tmp_path}/none", "--to", to) == 2
    assert code("data=prepared", f"data.path={tmp_path}", "--to", to) == 2
    assert code("data=jsonl", f"data.path={bad}", "--to", to) == 65
    assert "bad.jsonl, line 1: broken JSON" in capsys.readouterr().err
    assert code("verify", to) == 65
    assert code("show", str(tmp_path)) == 65


PROBLEMS = {
    "no components": (["data=mixture"], "data.components has none"),
    "weights sum to zero": (["+data.components.a={kind:python_stdlib,weight:0}"], "sum to 0"),
    "negative": (["+data.components.a={kind:python_stdlib,weight:-1}"], "weight = -1.0 is below 0"),
    "a mixture inside": (["+data.components.a={kind:mixture}"], "a mixture's components are no mixtures"),
    "its file missing": (["+data.components.a={kind:text,path:/none}"], "data.components.a.path = /none does not"),
    "its path missing": (["+data.components.a={kind:parquet}"], "data.components.a.path is not set"),
    "no mixture": (["data=python_stdlib", "+data.components.a={kind:text,path:/none}"], "is no mixture"),
    "no dataset": (["data=huggingface", "data.dataset=null"], "data.dataset is not set"),
    "no folder": (["data=huggingface", "data.dataset=./none"], "is not a folder, and no name of the hub"),
    "a subset of files": (["data=text", "data.path=/none", "data.subset=en"], "reads no dataset of the hub"),
    "chat in text": (["data=python_stdlib", "data.format=chat"], "has no records with messages"),
    "not prepared": (["data=prepared", "data.path=/none"], "data.path = /none is not a folder"),
    "streamed": (
        ["data=prepared", "data.path=/", "data.streaming=true"],
        "data.streaming = true, but data is prepared",
    ),
    "no workers": (["data=python_stdlib", "data.prepare_workers=0"], "data.prepare_workers = 0 is below 1"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_cannot_be_read_is_said_before_anything_starts(name: str) -> None:
    """Each wrong combination names its keys and is found with the config, by training and by preparing alike."""
    overrides, words = PROBLEMS[name]
    overrides = overrides if overrides[0].startswith("data=") else ["data=mixture", *overrides]
    with pytest.raises(ConfigError) as caught:
        make.load(overrides)
    assert words in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        check_config(compose(overrides), Machine())
    assert words in str(caught.value)


def test_a_component_that_is_prepared_already_is_not_copied(
    tmp_path: Path, sources: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """--to refuses it before anything is made, and says what to type; without --to it is mixed from where it is."""
    done, to = tmp_path / "done", tmp_path / "to"
    make.main(["data=text", f"data.path={tmp_path}/b", f"data.cache_dir={tmp_path}/cache", "--to", str(done)])
    mixed = [*sources, f"+data.components.old={{kind:prepared,path:{done},weight:1}}"]
    with pytest.raises(ConfigError, match=r"data\.components\.old\.kind = prepared(.|\n)*Try  the same without --to"):
        make.main([*mixed, "--to", str(to)])
    assert not to.exists()
    assert make.main(mixed)
    assert f"old: 1 part in {done}" in capsys.readouterr().out
    assert make.main([*mixed, "data.components.old.weight=0", "--to", str(to)])


def test_an_index_from_another_tokenizer_is_refused_before_the_start(tmp_path: Path, sources: list[str]) -> None:
    """With the fingerprint in the config, the mistake is found without starting anything."""
    to = tmp_path / "to"
    make.main([*sources, "--to", str(to)])
    prepared = ["data=prepared", f"data.path={to}", f"tokenizer.fingerprint={'f' * 64}"]
    with pytest.raises(ConfigError, match="was prepared with another tokenizer than tokenizer=bytes"):
        check_config(compose([*prepared]), Machine())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["+data.components.a={kind:text,pth:/}"], "data.components.a.pth is not a key"),
        (["+data.components.a={kind:txt}"], "data.components.a.kind = txt is none of its values"),
        (["+data.components.a={kind:text}", "data.components.a.weight=much"], "weight = much is not a number"),
        (["data.components.a.weight=2"], "data.components has no a yet"),
        (["+data.components.a=text"], "data.components.a holds keys, not a value"),
        (["+data.components.a={path:/}"], "data.components.a.kind is not set"),
    ],
)
def test_a_wrong_component_on_the_command_line_is_explained(overrides: list[str], words: str) -> None:
    """Unknown keys, values and names inside a component are named with their dotted key."""
    with pytest.raises(ConfigError) as caught:
        compose(["data=mixture", *overrides])
    assert words in str(caught.value)


def test_a_component_is_added_and_changed_on_one_command_line() -> None:
    """A later override of one key inside a component that an earlier one added is taken."""
    composed = compose(
        ["data=mixture", "+data.components.code={kind:text,path:/x,weight:0.3}", "data.components.code.weight=0.5"]
    )
    assert composed.data.components["code"].weight == 0.5
    assert composed.data.components["code"].path == "/x"


def test_two_components_of_one_name_in_a_file_are_refused(tmp_path: Path) -> None:
    """YAML would let the second replace the first; the file and the line are named instead."""
    (tmp_path / "data").mkdir()
    part = "  code: {kind: python_stdlib}\n"
    (tmp_path / "data" / "mine.yaml").write_text(f"kind: mixture\ncomponents:\n{part}{part}")
    with pytest.raises(ConfigError, match=r"mine\.yaml, line 4 is not valid YAML(.|\n)*duplicate key code"):
        compose(["data=mine"], str(tmp_path))


def test_a_damaged_mixture_is_refused(tmp_path: Path) -> None:
    """The file that says which folders are mixed names itself."""
    (tmp_path / "mixture.json").write_text("{}")
    with pytest.raises(DataError, match=r"mixture\.json is damaged"):
        show.open_all(tmp_path)


def test_preparing_imports_no_torch() -> None:
    """Tokenising needs neither torch nor, for files, datasets: both take seconds to import in every process."""
    program = "import sys, titan.prepare.__main__; print({'torch', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
