"""Held-out text that is also trained on is refused, under whatever name it goes."""

from __future__ import annotations

import itertools
from pathlib import Path

import datasets
import pytest

from titan.config.held_out import _overlap, check_validation
from titan.config.schema import DataConfig, DataKind, SourceConfig, TitanConfig, TokenizerConfig, TokenizerKind
from titan.data.prepare import Preparation, prepare_source
from titan.data.tokenizer import build_tokenizer

SPLITS = [
    *("train", "test", "train+test", "train[:10%]", "train[10%:]", "train[:10%]+test", "train[10%:20%]", "all"),
    *("train[:-10%]", "train[-10%:]", "train[:3]", "train[3:]", "train[:-3]", "train[-3:]", "train[2:5]", "train[:10]"),
    *("train[:5%](pct1_dropremainder)", "train[5%:](pct1_dropremainder)", "test [ : 10%]"),
]


def problems(data: SourceConfig, held_out: SourceConfig) -> list[str]:
    """Return what is wrong with validating on the one and training on the other."""
    config = TitanConfig(data=DataConfig(**vars(data)))
    config.validation.interval, config.validation.data = 5, held_out
    return [problem.what for problem in check_validation(config)]


def hub(split: str, dataset: str = "owner/name", subset: str | None = None) -> SourceConfig:
    """Return a dataset of the hub."""
    return SourceConfig(DataKind.huggingface, dataset=dataset, subset=subset, split=split)


def rows_of(split: str, count: int) -> set[int] | None:
    """Return the rows that the datasets library reads of splits of some size; None where it refuses."""
    sizes = {"train": count, "test": 7}
    starts = {"train": 0, "test": count}
    if split == "all":
        return set(range(count + 7))
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    except ValueError:
        return None
    return {starts[part.splitname] + row for part in parts for row in range(part.from_, part.to)}


def test_splits_that_share_a_row_are_told() -> None:
    """Whatever the size of a split: none that the datasets library reads twice is accepted."""
    sizes = (1, 9, 104, 105, 115, 1000)
    rows = {split: [rows_of(split, size) for size in sizes] for split in SPLITS}
    told = 0
    for one, other in itertools.product(SPLITS, repeat=2):
        share = any(a and b and a & b for a, b in zip(rows[one], rows[other], strict=True))
        assert _overlap(hub(one), hub(other)) == _overlap(hub(other), hub(one))
        assert _overlap(hub(one), hub(other)) or not share, (one, other)
        told += share
    assert told > 100


@pytest.mark.parametrize(
    ("trained", "held_out"),
    [
        ("train", "test"),
        ("train[:90%]", "train[90%:]"),
        ("train[1%:]", "train[:1%]"),
        ("train[:1000]", "train[1_000:]"),
        ("train[:-1000]", "train[-1000:]"),
        ("train[:-10%]", "train[-10%:]"),
        ("train[:50%] + extra", "train[50%:60%]+train[90%:]"),
    ],
)
def test_slices_that_clearly_do_not_overlap_are_accepted(trained: str, held_out: str) -> None:
    """As people write them who have only one split."""
    assert problems(hub(trained), hub(held_out)) == []


def test_a_slice_of_what_is_trained_on_is_refused(tmp_path: Path) -> None:
    """With the split that holds it; a folder is the same under all its names."""
    assert problems(hub("train"), hub("train[:1%]")) == [
        "validation.data is the split train[:1%] of owner/name, and data trains on the split train of owner/name"
    ]
    (tmp_path / "link").symlink_to(tmp_path)
    same = hub("train", str(tmp_path)), hub("train", f"{tmp_path}/link/")
    assert len(problems(*same)) == 1
    assert problems(hub("train", subset="en"), hub("train", subset="de")) == []


def prepare(folder: Path, text: Path) -> SourceConfig:
    """Prepare a file."""
    tokenizer = build_tokenizer(TokenizerConfig(TokenizerKind.bytes))
    source = SourceConfig(DataKind.text, path=str(text))
    prepare_source(source, folder, Preparation(tokenizer, str(folder), workers=1))
    return SourceConfig(DataKind.prepared, path=str(folder))


def test_what_was_prepared_is_known_by_its_folder_and_by_its_source(tmp_path: Path) -> None:
    """One folder under two names, the text it was made from, and two folders of one text, in a mixture's folder too."""
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name * 50)
    text, other = (SourceConfig(DataKind.text, path=str(tmp_path / name)) for name in ("a.txt", "b.txt"))
    folder = prepare(tmp_path / "mixed" / "a", tmp_path / "a.txt")
    again = prepare(tmp_path / "again", tmp_path / "a.txt")
    different = prepare(tmp_path / "different", tmp_path / "b.txt")
    (tmp_path / "link").symlink_to(tmp_path)
    linked = SourceConfig(DataKind.prepared, path=f"{tmp_path}/link/mixed/a/")
    mixed = SourceConfig(DataKind.prepared, path=str(tmp_path / "mixed"))
    for one, two in [
        (folder, folder),
        (folder, linked),
        (folder, text),
        (folder, again),
        (mixed, text),
        (mixed, again),
    ]:
        assert len(problems(one, two)) == len(problems(two, one)) == 1
    for one, two in [(folder, other), (folder, different), (mixed, different)]:
        assert problems(one, two) == problems(two, one) == []
    (tmp_path / "a.txt").unlink()
    assert len(problems(mixed, linked)) == len(problems(linked, mixed)) == 1
