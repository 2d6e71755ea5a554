"""Weights & Biases in offline mode, with the real library: what its file holds, read by its own format."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.metrics.test_tensorboard import read as read_curves
from tests.support.command import TINY, clean_environment, finish, start
from titan.config.tracking import has_wandb_key

BLOCK = 32768
HEADER = 7
"""Bytes before the first record of a file, and before each piece of one."""
KEY = "0123456789abcdef0123456789abcdef01234567"


def records(path: Path) -> Iterator[Any]:
    """Yield what the library has written: protobuf messages, in blocks as LevelDB has them."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = path.read_bytes(), HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # too little for another piece
            at += BLOCK - at % BLOCK
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + HEADER])
        whole += data[at + HEADER : at + HEADER + size]
        at += HEADER + size
        if kind in (1, 4):  # a whole record, or the last piece of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def rows(found: list[Any]) -> list[dict[str, Any]]:
    """Return the rows that were logged."""
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in found
        if record.WhichOneof("record_type") == "history"
    ]


@pytest.mark.slow
def test_a_run_and_its_resumption_are_one_run_there(tmp_path: Path, cache: Path, text_file: Path) -> None:
    """After going on and going back, its steps are those of metrics.jsonl, none twice, and so are TensorBoard's.

    The id and the config go along; the key is nowhere.
    """
    environment = clean_environment(cache, WANDB_API_KEY=KEY)
    command = [
        *("-m", "titan.train", *TINY, f"data.path={text_file}", "run.dir=run", "metrics.log_every=1"),
        *("metrics=wandb", "metrics.wandb.mode=offline", "metrics.wandb.tags=[some,words]", "checkpoint.interval=2"),
        "metrics.tensorboard=true",
    ]
    for further in (["training.steps=3"], ["training.steps=5"], ["training.steps=5", "checkpoint.load_step=4"]):
        finished = finish(start([*command, *further], tmp_path, environment))
        assert finished.code == 0, finished.text
        assert "wandb      run/wandb, for `wandb sync`" in finished.out
        assert "left out" not in finished.text
        assert "wandb:" not in finished.text, "the library itself says nothing"
    run = tmp_path / "run"
    files = sorted(run.glob("wandb/offline-run-*/run-*.wandb"))
    assert len({path.name for path in files}) == 1, "the same id"
    parts = [list(records(path)) for path in files]
    started = [next(each.run for each in part if each.WhichOneof("record_type") == "run") for part in parts]
    assert [(each.run_id, each.project, list(each.tags)) for each in started] == [
        (json.loads((run / "wandb.json").read_text())["id"], "titan", ["some", "words"])
    ] * 3
    config = {item.key: json.loads(item.value_json) for item in started[0].config.update}
    assert config["training"]["seq_len"] == 32
    assert config["model"]["norm_eps"] == 1e-5, "a number, not a text"
    assert config["metrics"]["wandb"]["mode"] == "offline"
    sent = [(row["_step"], row["train/loss"]) for part in parts for row in rows(part)]
    written = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sent == [(row["step"], row["loss"]) for row in written]
    shown = read_curves(run / "tensorboard")["train/loss"]
    assert [(step, pytest.approx(loss)) for step, loss in shown] == sent
    for path in run.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


@pytest.mark.slow
def test_a_server_that_does_not_answer_stops_no_run(tmp_path: Path, cache: Path, text_file: Path) -> None:
    """Without a network the run says so once and trains to its end, in bounded time."""
    unreachable = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": KEY}
    command = ["-m", "titan.train", *TINY, f"data.path={text_file}", "run.dir=run", "metrics=wandb"]
    began = time.monotonic()
    finished = finish(start(command, tmp_path, clean_environment(cache, **unreachable)))
    assert finished.code == 0, finished.text
    assert finished.err.count("Weights & Biases is left out from here on, training goes on: ") == 1
    assert "done: step 2" in finished.out
    assert KEY not in finished.text
    assert time.monotonic() - began < 150


@pytest.mark.parametrize("by", ["environment", "netrc", "nothing"])
def test_a_key_is_found_where_the_library_looks(by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """WANDB_API_KEY, or the netrc file that `wandb login` writes; else there is none."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    if by == "environment":
        monkeypatch.setenv("WANDB_API_KEY", KEY)
    elif by == "netrc":
        (tmp_path / ".netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
        (tmp_path / ".netrc").chmod(0o600)
    assert has_wandb_key() is (by != "nothing")
