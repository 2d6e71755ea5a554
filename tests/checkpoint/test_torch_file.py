"""Files of torch.save: written tensor by tensor as torch.save would, read without running anything."""

from __future__ import annotations

import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.foreign import META, SCALING, Payload, random_weights, shape
from titan.checkpoint.files import TensorInfo
from titan.checkpoint.torch_file import TorchFile, config_content, write_torch_file
from titan.errors import CheckpointError

WEIGHTS = random_weights(META)
OPTIMIZER = {"norm.weight.exp_avg": torch.randn(64), "norm.weight.step": torch.tensor(7.0)}


def write(path: Path, parts: dict[str, dict[str, torch.Tensor]], **more: Any) -> None:
    """Write a file with titan's writer."""
    infos = {
        part: {name: TensorInfo(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        for part, tensors in parts.items()
    }
    write_torch_file(path, infos, lambda part, name: parts[part][name], more)


def test_torch_loads_what_is_written(tmp_path: Path) -> None:
    """With weights_only, mapped or not; every number, and what is beside the tensors."""
    formats = {
        "brain": torch.randn(3, 4).bfloat16(),
        "half": torch.randn(2).half(),
        "double": torch.randn(1, 2, 3).double(),
        "count": torch.arange(3),
        "turned": torch.randn(4, 6).T,
        "none": torch.empty(0, 3),
    }
    parts = {"model": {**WEIGHTS, **formats}, "optimizer": OPTIMIZER}
    write(tmp_path / "x.pt", parts, step=7, config=config_content(shape(rope_scaling=SCALING)))
    for mmap in (True, False):
        found = torch.load(tmp_path / "x.pt", weights_only=True, mmap=mmap)
        assert found["step"] == 7
        assert found["config"]["model"]["rope_scaling"]["factor"] == 8.0
        for part, tensors in parts.items():
            assert found[part].keys() == tensors.keys()
            for name, tensor in tensors.items():
                assert torch.equal(found[part][name], tensor), name
                assert found[part][name].dtype == tensor.dtype
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        assert archive.testzip() is None


def test_a_file_of_titan_comes_back(tmp_path: Path) -> None:
    """Weights, optimizer, step, tokens and shape."""
    config = shape(rope_scaling=SCALING)
    more = {"step": 3, "tokens": 600, "config": config_content(config)}
    write(tmp_path / "x.pt", {"model": WEIGHTS, "optimizer": OPTIMIZER}, **more)
    file = TorchFile(tmp_path / "x.pt")
    assert (file.step, file.tokens, file.config) == (3, 600, config)
    assert file.optimizer is not None
    assert torch.equal(file.optimizer.read("norm.weight.step"), torch.tensor(7.0))
    part = file.model.read("layers.1.feed_forward.w2.weight", range(3, 9), range(5, 100))
    assert torch.equal(part, WEIGHTS["layers.1.feed_forward.w2.weight"][3:9, 5:100])
    assert part.untyped_storage().nbytes() == part.nbytes


@pytest.mark.parametrize("content", [WEIGHTS, {"model": WEIGHTS}, OrderedDict(WEIGHTS)])
def test_what_others_save_is_read(tmp_path: Path, content: dict[str, Any]) -> None:
    """A dict of tensors, alone or as "model"; it does not say of which shape the model is."""
    torch.save(content, tmp_path / "x.pt")
    file = TorchFile(tmp_path / "x.pt")
    assert file.model.infos().keys() == WEIGHTS.keys()
    assert (file.step, file.tokens, file.config, file.optimizer) == (0, 0, None, None)


def _legacy(path: Path) -> None:
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "text": (lambda path: path.write_text("weights"), "cannot be read"),
    "nothing": (lambda path: path.write_bytes(b""), "cannot be read"),
    "a tensor": (lambda path: torch.save(torch.ones(3), path), "holds a Tensor, not a dict of tensors"),
    "numbers": (lambda path: torch.save({"model": {"a": 3}}, path), "a is a int, not a tensor"),
    "an optimizer of torch": (
        lambda path: torch.save({"model": WEIGHTS, "optimizer": {"state": {}, "param_groups": []}}, path),
        "optimizer: state is a dict, not a tensor",
    ),
    "a list as optimizer": (
        lambda path: torch.save({"model": WEIGHTS, "optimizer": [1]}, path),
        "optimizer: it is a list, not a dict of tensors",
    ),
    "names of transformers": (
        lambda path: torch.save({"model.layers.0.self_attn.q_proj.weight": torch.ones(3)}, path),
        r"its names are those of the transformers library.*\n.*Try  model.save_pretrained\(FOLDER\)",
    ),
    "a quantised tensor": (lambda path: torch.save({"a": torch.ones(3).to(torch.int8)}, path), "a is int8, strided"),
    "a sparse tensor": (lambda path: torch.save({"a": torch.eye(3).to_sparse()}, path), "a is float32, sparse_coo"),
    "an old file": (_legacy, r"format of before PyTorch 1.6\n  Try  torch.save"),
    "another version's config": (
        lambda path: torch.save({"model": WEIGHTS, "config": {"model": {"width": 3}}}, path),
        "its config is of another version",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_such_file_is_refused(tmp_path: Path, name: str) -> None:
    """The error names the file and what is wrong with it."""
    make, words = BAD[name]
    make(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=words) as caught:
        TorchFile(tmp_path / "x.pt")
    assert str(tmp_path / "x.pt") in str(caught.value)


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    """A pickle that would run a command is refused, and the command does not run."""
    torch.save({"model": WEIGHTS, "more": Payload(tmp_path / "ran")}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="what it asks for was not run"):
        TorchFile(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()
