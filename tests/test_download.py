"""The command that fetches from the hub, against a hub in this process: what it fetches, and what else it says."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from tests.support.configs import compose
from titan import download
from titan.config.vocabulary import count_tokens

from .data.vocabulary import write_json_tokenizer, write_pieces, write_tokenizer
from .support.command import Finished, clean_environment, finish, start
from .support.hub import COMMIT, Hub

WEIGHTS = os.urandom(50_000)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What is in a repository like Llama 3's: everything twice."""
    folder = write_json_tokenizer(tmp_path_factory.mktemp("files"))
    return {
        "README.md": b"words",
        "config.json": b"{}",
        "model-00001-of-00002.safetensors": WEIGHTS,
        "model-00002-of-00002.safetensors": b"more",
        "model.safetensors.index.json": b"{}",
        "consolidated.safetensors": b"the same again",
        "pytorch_model.bin": b"and again",
        "original/consolidated.00.pth": b"and again",
        "original/params.json": b"{}",
        "original/tokenizer.model": write_tokenizer(folder / "ranks").read_bytes(),
        "tokenizer.json": (folder / "tokenizer.json").read_bytes(),
        "tokenizer_config.json": (folder / "tokenizer_config.json").read_bytes(),
    }


@pytest.fixture
def hub(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that the client in this process asks, with nothing kept from before and no token."""
    hub = Hub({"meta/llama": files, "some/words": {"README.md": b"words"}})
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # before it tries again
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    yield hub
    hub.close()


@pytest.fixture
def fetch(hub: Hub, here: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """The command, in this process."""

    def run(*arguments: str) -> Finished:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            download.main(arguments)
        return Finished(exit.value.code or 0, *capsys.readouterr())  # type: ignore[arg-type]

    return run


def inside(folder: Path) -> set[str]:
    """Return the files below a folder, without what the client keeps for itself."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {name for name in found if not name.startswith(".cache/")}


def test_a_tokenizer_comes_with_the_words_to_use_it(fetch: Callable[..., Finished], files: dict[str, bytes]) -> None:
    """All of its files and none of the weights; what is printed at the end composes and reads it."""
    done = fetch("tokenizer", "meta/llama", "--to", "tok")
    assert done.code == 0, done.text
    names = {"tokenizer.json", "tokenizer_config.json", "original/tokenizer.model"}
    assert inside(Path("tok")) == names
    assert all((Path("tok") / name).read_bytes() == files[name] for name in names)
    assert COMMIT in done.out
    assert ": 3 files, " in done.out
    counts = []
    for line in done.out.splitlines():
        if "tokenizer=" in line:
            config = compose(line.split("   ", 1)[1].split())
            assert Path(config.tokenizer.path or "").is_absolute()
            counts.append(count_tokens(config.tokenizer))
    assert len(counts) == 2
    assert counts[0] == 256 + 10 + 256


def test_a_checkpoint_comes_once(fetch: Callable[..., Finished]) -> None:
    """Of weights that are there in five shapes, the safetensors are taken, with config and tokenizer."""
    done = fetch("checkpoint", "meta/llama", "--to", "weights")
    assert done.code == 0, done.text
    assert inside(Path("weights")) == {
        *("config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"),
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "original/tokenizer.model"),
    }
    assert f"checkpoint.initial_load={Path('weights').absolute()}" in done.out
    assert "tokenizer=tiktoken tokenizer.path=" in done.out


def test_metas_own_files_come_when_asked_for(fetch: Callable[..., Finished]) -> None:
    """--original takes original/ instead, and says how to import it."""
    done = fetch("checkpoint", "meta/llama", "--to", "weights", "--original")
    assert done.code == 0, done.text
    assert {"original/consolidated.00.pth", "original/params.json"} <= inside(Path("weights"))
    assert not any(name.endswith(".safetensors") for name in inside(Path("weights")))
    assert f"titan.convert import {Path('weights/original').absolute()} CHECKPOINT" in done.out


def test_without_a_folder_it_goes_to_the_clients_cache(
    fetch: Callable[..., Finished], hub: Hub, tmp_path: Path
) -> None:
    """What other programs have fetched is not fetched again."""
    first = fetch("tokenizer", "meta/llama")
    assert first.code == 0, first.text
    assert str(tmp_path / "cache") in first.out
    hub.requests.clear()
    again = fetch("tokenizer", "meta/llama", "--revision", COMMIT)
    assert again.out == first.out
    assert not [path for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path]


def test_llama_2s_tokenizer_is_told_from_llama_3s(fetch: Callable[..., Finished], hub: Hub, tmp_path: Path) -> None:
    """Both are called tokenizer.model; the words to use it name the kind that reads it."""
    hub.repositories["meta/llama2"] = {"tokenizer.model": write_pieces(tmp_path / "pieces").read_bytes()}
    done = fetch("tokenizer", "meta/llama2", "--to", "tok")
    assert f"Train with   tokenizer=sentencepiece tokenizer.path={Path('tok/tokenizer.model').absolute()}" in done.out


def test_a_connection_that_breaks_is_taken_up_where_it_broke(fetch: Callable[..., Finished], hub: Hub) -> None:
    """The rest of the file alone is asked for, and the file is whole."""
    name = "model-00001-of-00002.safetensors"
    hub.cut[name] = [30_000, 5_000]
    done = fetch("checkpoint", "meta/llama", "--to", "weights")
    assert done.code == 0, done.text
    assert (Path("weights") / name).read_bytes() == WEIGHTS
    ranges = [ranged for method, path, ranged in hub.requests if method == "GET" and path.endswith(name)]
    assert ranges[0] is None
    starts = [int((ranged or "").removeprefix("bytes=").rstrip("-")) for ranged in ranges[1:]]
    assert len(starts) == 2
    assert 0 < starts[0] <= 30_000
    assert starts[0] < starts[1] <= 35_000


def test_the_same_command_fetches_what_is_missing(fetch: Callable[..., Finished], hub: Hub) -> None:
    """When a connection keeps breaking the command ends; again, it fetches that file and no other."""
    name = "model-00001-of-00002.safetensors"
    hub.cut[name] = [30_000] + [0] * 10
    broken = fetch("checkpoint", "meta/llama", "--to", "weights")
    assert broken.code == 2, broken.text
    assert "broke in the middle\n  Try  the same command again; files that are whole stay" in broken.err
    assert not (Path("weights") / name).exists()
    there = inside(Path("weights"))
    hub.cut.clear()
    hub.requests.clear()
    done = fetch("checkpoint", "meta/llama", "--to", "weights")
    assert done.code == 0, done.text
    assert (Path("weights") / name).read_bytes() == WEIGHTS
    fetched = {
        path.split(COMMIT + "/")[1] for method, path, _ in hub.requests if method == "GET" and COMMIT + "/" in path
    }
    assert name in fetched
    assert not fetched & there


REFUSED = {
    "gated, no token": ("meta/llama", None, ["is gated, and there is no token", "Accept its licence", "HF_TOKEN=..."]),
    "gated, not granted": ("meta/llama", "hf_other", ["has no access to it", "Accept its licence at http"]),
    "a bad token": ("meta/llama", "hf_wrong", ["does not take this token: it is wrong or was revoked"]),
    "no repository": ("no/such", "hf_good", ["no/such does not exist", "not for the account of this token"]),
    "no repository, no token": ("no/such", None, ["does not exist", "there is no token", "export HF_TOKEN=..."]),
    "no revision": ("some/words --revision v9", None, ["some/words has no revision v9", "--revision main"]),
    "no tokenizer": ("some/words", None, ["some/words has no tokenizer", "It has README.md"]),
    "no name": ("a/b/c", None, ["a/b/c is no name of a repository", "OWNER/NAME"]),
    "broken": ("broken/one", None, ["answers 503 for broken/one", "later"]),
    "forbidden": ("forbidden/one", "hf_good", ["does not permit it (403)", "permission"]),
    "a token that cannot be": ("some/words", "hf_secrét", ["the token has characters that no token has"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_had_says_why(
    fetch: Callable[..., Finished], hub: Hub, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Exit code 2, what to do, no traceback, and never the token."""
    repository, token, words = REFUSED[name]
    hub.gated.add("meta/llama")
    hub.statuses |= {"broken/one": 503, "forbidden/one": 403}
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    done = fetch("tokenizer", *repository.split())
    assert done.code == 2
    for each in words:
        assert each in done.err
    assert "Traceback" not in done.text
    assert token is None or token not in done.text


def test_weights_that_are_not_there_say_what_is(fetch: Callable[..., Finished], hub: Hub) -> None:
    """A repository without safetensors names what it has instead, and the way to that."""
    hub.repositories["a/pickles"] = {"config.json": b"{}", "pytorch_model.bin": b""}
    hub.repositories["a/meta"] = {"original/consolidated.00.pth": b"", "config.json": b"{}"}
    hub.repositories["a/bare"] = {"model.safetensors": b""}
    for repository, words in (
        ("a/pickles", "no safetensors\n  It has config.json, pytorch_model.bin.\n  Its weights are pickles"),
        ("a/meta", "Try  --original"),
        ("a/bare", "has no config.json"),
    ):
        done = fetch("checkpoint", repository)
        assert done.code == 2
        assert words in done.err
    assert "has no original/*.pth" in fetch("checkpoint", "a/bare", "--original").err


def test_offline_is_said(fetch: Callable[..., Finished], hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE and a hub that does not answer are two things, each with its way out."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    done = fetch("tokenizer", "meta/llama")
    assert (done.code, "HF_HUB_OFFLINE is set" in done.err) == (2, True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    hub.close()
    done = fetch("tokenizer", "meta/llama")
    assert (done.code, "127.0.0.1 cannot be reached" in done.err) == (2, True)
    assert "HF_ENDPOINT" in done.err


def test_a_disk_that_takes_nothing_is_said(fetch: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that cannot be made, and a disk that is full in the middle."""
    Path("file").touch()
    done = fetch("tokenizer", "meta/llama", "--to", "file/inside")
    assert (done.code, "file/inside cannot be written: Not a directory" in done.err) == (2, True)

    def fill(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fill)
    done = fetch("tokenizer", "meta/llama", "--to", "tok")
    assert (done.code, "tok is full (No space left on device)" in done.err) == (2, True)


def test_a_file_that_is_not_whole_is_not_used(fetch: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes are held against the hub's own before anything is said to be there."""
    real = huggingface_hub.snapshot_download

    def cut(*arguments: str, **options: object) -> str:
        folder = real(*arguments, **options)  # type: ignore[arg-type]
        (Path(folder) / "tokenizer.json").write_bytes(b"{")
        return folder

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cut)
    done = fetch("tokenizer", "meta/llama", "--to", "tok")
    assert (done.code, "tokenizer.json did not arrive whole" in done.err) == (2, True)


def test_as_a_process_it_takes_the_environment(hub: Hub, here: Path, cache: Path, tmp_path: Path) -> None:
    """HF_ENDPOINT and HF_TOKEN lead the real command, which imports neither torch nor what tokenises."""
    hub.gated.add("meta/llama")
    code = (
        "import sys, atexit, titan.download as command\n"
        "heavy = lambda: {'torch', 'transformers', 'tiktoken', 'tokenizers', 'datasets'} & set(sys.modules)\n"
        "atexit.register(lambda: print('heavy', heavy()))\n"
        "command.main()"
    )
    environment = clean_environment(cache, HF_ENDPOINT=hub.url, HF_TOKEN="hf_good", HF_HOME=str(tmp_path / "home"))
    done = finish(start(["-c", code, "tokenizer", "meta/llama", "--to", "tok"], here, environment))
    assert done.code == 0, done.text
    assert "heavy set()" in done.out
    assert json.loads((here / "tok/tokenizer_config.json").read_text())["bos_token"] == "<s>"
    assert "hf_good" not in done.text
