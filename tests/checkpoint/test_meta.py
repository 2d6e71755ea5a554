"""Meta's own files, cut as its model-parallel ranks cut them: put together again, and refused if one is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.foreign import META, Payload, random_weights, save_meta
from titan.checkpoint.meta import MetaWeights, ffn_dim, is_meta, open_meta
from titan.config.schema import RopeScalingConfig
from titan.errors import CheckpointError
from titan.models.llama import LLAMA

WEIGHTS = random_weights(META)


def open_folder(folder: Path) -> MetaWeights:
    """Return a folder's weights."""
    return open_meta(folder, LLAMA)[1]


@pytest.mark.parametrize("parts", [1, 2, 8])
@pytest.mark.parametrize("cuts_words", [True, False])
def test_parts_are_put_together(tmp_path: Path, parts: int, cuts_words: bool) -> None:
    """Any number of ranks, the embedding cut either way: the tensors are those that were cut, in whole and in part."""
    save_meta(tmp_path / "meta", WEIGHTS, parts, cuts_words)
    config, weights, notes = open_meta(tmp_path / "meta", LLAMA)
    assert (config, notes) == (META, [])
    assert weights.infos().keys() == WEIGHTS.keys()
    for name, tensor in WEIGHTS.items():
        assert torch.equal(weights.read(name), tensor), name
        last = tensor.shape[0] - 3
        part = weights.read(name, range(5, last), range(3, 50))
        assert torch.equal(part, tensor[5:last, 3:50] if tensor.ndim > 1 else tensor[5:last]), name
        assert part.untyped_storage().nbytes() == part.nbytes


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, {}),
        ({"vocab_size": 72, "rope_theta": 500000.0}, {"rope_theta": 500000.0, "max_seq_len": 8192}),
        (
            {"rope_theta": 500000.0, "use_scaled_rope": True},
            {"rope_theta": 500000.0, "max_seq_len": 131072, "rope_scaling": RopeScalingConfig(factor=8.0)},
        ),
        ({"n_kv_heads": None, "n_heads": 8}, {"n_kv_heads": 8}),
    ],
)
def test_params_are_read(tmp_path: Path, params: dict[str, object], expected: dict[str, object]) -> None:
    """Every generation's params.json gives the shape; what is not in it follows from the generation."""
    config = replace(META, **expected)  # type: ignore[arg-type]
    save_meta(tmp_path / "meta", random_weights(config), **params)
    found, _, notes = open_meta(tmp_path / "meta", LLAMA)
    assert found == config
    assert notes == (
        ["params.json has use_scaled_rope, and not by which factor: 8 is assumed"]
        if "use_scaled_rope" in params
        else []
    )


@pytest.mark.parametrize(
    ("dim", "multiple_of", "multiplier", "expected"),
    [
        (4096, 256, 1.0, 11008),  # Llama 2 7B
        (5120, 256, 1.0, 13824),  # Llama 2 13B
        (8192, 4096, 1.3, 28672),  # Llama 2 70B
        (4096, 1024, 1.3, 14336),  # Llama 3 8B
        (16384, 4096, 1.2, 53248),  # Llama 3.1 405B
        (2048, 256, 1.5, 8192),  # Llama 3.2 1B
        (3072, 256, 1.0, 8192),  # Llama 3.2 3B
    ],
)
def test_the_published_widths_come_out(dim: int, multiple_of: int, multiplier: float, expected: int) -> None:
    """Of the feed-forward layer, from the params.json of each published model."""
    assert ffn_dim({"dim": dim, "multiple_of": multiple_of, "ffn_dim_multiplier": multiplier}) == expected


def test_an_output_that_is_the_embedding_is_tied(tmp_path: Path) -> None:
    """Llama 3.2's files have both, to the bit the same; older tied ones would have one."""
    tied = {**WEIGHTS, "output.weight": WEIGHTS["tok_embeddings.weight"].clone()}
    save_meta(tmp_path / "both", tied, 2)
    del tied["output.weight"]
    save_meta(tmp_path / "one", tied, 2)
    for name in ("both", "one"):
        config, weights, _ = open_meta(tmp_path / name, LLAMA)
        assert config.tie_embeddings
        assert "output.weight" not in weights.infos()


def _edit(index: int, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / f"consolidated.{index:02d}.pth"
        part = torch.load(path, weights_only=True)
        change(part)
        torch.save(part, path)

    return edit


def _params(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / "params.json").read_text())
        (folder / "params.json").write_text(json.dumps(content | changes))

    return edit


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing file": (lambda folder: (folder / "consolidated.01.pth").unlink(), "consolidated.01.pth is missing"),
    "the last file missing": (
        lambda folder: (folder / "consolidated.03.pth").unlink(),
        r"layers.0.attention.wq.weight has the shape \[48, 64\], and the model has \[64, 64\]",
    ),
    "no file": (lambda folder: [path.unlink() for path in folder.glob("*.pth")], "it has no consolidated.00.pth"),
    "a truncated file": (
        lambda folder: (folder / "consolidated.02.pth").write_bytes(
            (folder / "consolidated.02.pth").read_bytes()[:5000]
        ),
        "consolidated.02.pth cannot be read",
    ),
    "something else": (
        lambda folder: (folder / "consolidated.02.pth").write_bytes(b"text"),
        "consolidated.02.pth cannot be",
    ),
    "a list": (lambda folder: torch.save([1], folder / "consolidated.02.pth"), "holds a list, not a dict of tensors"),
    "a text in it": (_edit(1, lambda part: part.update(step=3)), "consolidated.01.pth holds more than tensors: step"),
    "a tensor in one only": (
        _edit(1, lambda part: part.pop("norm.weight")),
        "norm.weight is in only one of consolidated.00.pth and consolidated.01.pth",
    ),
    "norms that differ": (
        _edit(3, lambda part: part["norm.weight"].add_(1)),
        "norm.weight is not the same in consolidated.00.pth and consolidated.03.pth",
    ),
    "another format": (
        _edit(3, lambda part: part.update({"norm.weight": part["norm.weight"].half()})),
        "norm.weight of consolidated.03.pth has other dims or another format",
    ),
    "another vocabulary": (_params(vocab_size=70, n_layers=3), "vocab_size = 70, but the files have 72 words"),
    "another depth": (_params(n_layers=3), "layers.2.attention.wq.weight is missing"),
    "no width": (_params(dim=None), "dim = None is no positive number"),
    "uneven heads": (_params(n_heads=12), "dim = 64, n_heads = 12, n_kv_heads = 2: heads do not come out even"),
    "no positions": (_params(rope_theta="far"), "rope_theta = far is no positive number"),
    "no params": (lambda folder: (folder / "params.json").write_text("[]"), "params.json cannot be used"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_not_whole_is_refused(tmp_path: Path, name: str) -> None:
    """The error says which file or tensor is wrong."""
    damage, words = DAMAGE[name]
    save_meta(tmp_path / "meta", WEIGHTS, 4)
    damage(tmp_path / "meta")
    with pytest.raises(CheckpointError, match=words):
        open_folder(tmp_path / "meta")


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    """A pickle that would run a command is refused, and the command does not run."""
    save_meta(tmp_path / "meta", WEIGHTS, 2)
    torch.save({"norm.weight": Payload(tmp_path / "ran")}, tmp_path / "meta" / "consolidated.01.pth")
    with pytest.raises(CheckpointError, match=r"consolidated.01.pth cannot be read: .* was not run"):
        open_folder(tmp_path / "meta")
    assert not (tmp_path / "ran").exists()


def test_a_folder_is_recognised(tmp_path: Path) -> None:
    """By its params.json."""
    save_meta(tmp_path / "meta", WEIGHTS)
    assert is_meta(tmp_path / "meta")
    assert not is_meta(tmp_path)
