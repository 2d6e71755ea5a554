"""Rows of several components, each in its share; and from a config to all rows of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import xxhash

from titan.config.schema import ComponentConfig, DataConfig, DataKind, Packing, SourceConfig
from titan.data.batch import MixtureOrder
from titan.data.prepare import Preparation, find_or_prepare
from titan.data.prepared import MANIFEST, Prepared, open_prepared
from titan.data.rows import Piece, PreparedRows, Row, Rows, plan_rows
from titan.data.tokenizer import Tokenizer
from titan.errors import DataError
from titan.run_directory import write_atomically

MIXTURE = "mixture.json"
"""In a folder of several prepared components: their names and weights."""


class MixtureRows:
    """The rows of several components, numbered one component after the other.

    Args:
        components: By name; at least one.
        weights: The share of each beside the others'.
    """

    def __init__(self, components: dict[str, PreparedRows], weights: dict[str, float]) -> None:
        self.components, self.weights = components, weights
        self._parts = list(components.values())
        self._firsts = np.cumsum([0, *(len(rows) for rows in self._parts)])

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def read(self, rows: Sequence[int] | np.ndarray) -> Row:
        """Return some rows. Shape: (B, S) each."""
        wanted = np.asarray(rows, np.int64)
        of = np.searchsorted(self._firsts, wanted, side="right") - 1
        columns: list[np.ndarray | None] | None = None
        for part in np.unique(of):
            chosen = np.flatnonzero(of == part)
            found = self._parts[part].read(wanted[chosen] - self._firsts[part])
            if columns is None:
                shape = (len(wanted), found.inputs.shape[1])
                columns = [None if column is None else np.empty(shape, np.int64) for column in found]
            for column, values in zip(columns, found, strict=True):
                if column is not None:
                    column[chosen] = values
        assert columns is not None, "no rows asked for"
        inputs, labels, starts = columns
        assert inputs is not None
        assert labels is not None
        return Row(inputs, labels, starts)

    def documents_of(self, row: int) -> list[Piece]:
        """Return which documents a row is made of."""
        part = int(np.searchsorted(self._firsts, row, side="right")) - 1
        return self._parts[part].documents_of(row - int(self._firsts[part]))

    def read_tokens(self, piece: Piece, whole: bool = False) -> np.ndarray:
        """Return a piece's tokens, or those of its whole document. Shape: (N,)."""
        return self.components[piece.component].read_tokens(piece, whole)

    def order(self, global_batch_size: int, seed: int) -> MixtureOrder:
        """Return the order in which rows are visited."""
        orders = [replace(rows.order(global_batch_size, seed), name=name) for name, rows in self.components.items()]
        return MixtureOrder(tuple(orders), tuple(self.weights[name] for name in self.components), global_batch_size)

    @property
    def shares(self) -> dict[str, float]:
        """The share of each component in the rows."""
        total = sum(self.weights.values())
        return {name: weight / total for name, weight in self.weights.items()}

    @property
    def digest(self) -> str:
        """Changes when any row or any weight does."""
        told = [[name, rows.digest, self.weights[name]] for name, rows in sorted(self.components.items())]
        return xxhash.xxh3_128_hexdigest(json.dumps(told).encode())

    @property
    def tokens(self) -> int:
        """All tokens of all components."""
        return sum(rows.tokens for rows in self._parts)

    @property
    def text_bytes(self) -> int:
        """Bytes of all text in UTF-8."""
        return sum(rows.text_bytes for rows in self._parts)

    def describe(self) -> list[str]:
        """Return what a person wants to know of each component, as lines."""
        return [f"{name}: {line}" for name, rows in self.components.items() for line in rows.describe()]

    def describe_shares(self, rows_trained: int) -> list[str]:
        """Return each component's share, rows and epochs in a run of so many rows, as lines."""
        counts = self.order(1, 0).counts_before(rows_trained)
        return [
            f"{name}: {self.shares[name]:.2%} of the rows, {count:,} of {len(rows):,} ({count / len(rows):.3g} epochs)"
            for (name, rows), count in zip(self.components.items(), counts, strict=True)
        ]


def load_rows(
    config: SourceConfig,
    seq_len: int,
    preparation: Preparation,
    packing: Packing = Packing.concat,
    mask_documents: bool = False,
) -> Rows:
    """Return all rows of a source or a mixture, tokenised now as far as they are not yet.

    Raises:
        DataError: If a document is bad, if prepared data is damaged or of another tokenizer, or if nothing can be
            written.
    """

    def rows_of(prepared: Prepared, name: str) -> PreparedRows:
        told = preparation
        plan = None
        if packing is Packing.best_fit:
            plan = plan_rows(prepared, seq_len, told.cache_dir, told.is_writer, told.timeout_seconds)
        return PreparedRows(prepared, seq_len, told.tokenizer.eos, plan, mask_documents, name)

    found = find_prepared(config, preparation)
    parts = {name: rows_of(prepared, name) for name, (prepared, _) in found.items()}
    return parts[""] if "" in parts else MixtureRows(parts, {name: weight for name, (_, weight) in found.items()})


def find_prepared(config: SourceConfig, preparation: Preparation) -> dict[str, tuple[Prepared, float]]:
    """Return the prepared documents of each component by name, with its weight: see `open_folder`.

    Raises:
        DataError: As `load_rows`.
    """
    if config.kind is DataKind.prepared:
        return _open(config, preparation.tokenizer)
    if config.kind is not DataKind.mixture:
        return {"": (find_or_prepare(config, preparation), 1.0)}
    assert isinstance(config, DataConfig)
    found: dict[str, tuple[Prepared, float]] = {}
    for name, component in components_of(config).items():
        if component.kind is DataKind.prepared:
            parts = _open(component, preparation.tokenizer)
            if "" not in parts:
                raise DataError(
                    f"data.components.{name}.path = {component.path} is a mixture itself\n"
                    f"  Try  data.components.{name}.path={component.path}/{next(iter(parts))}"
                )
            prepared, _ = parts[""]
        else:
            prepared = find_or_prepare(source_of(component), preparation, name)
        found[name] = prepared, component.weight
    return found


def components_of(config: DataConfig) -> dict[str, ComponentConfig]:
    """Return the components of a mixture that have a share, by name and in the order of their names."""
    return {name: component for name, component in sorted(config.components.items()) if component.weight > 0}


def source_of(component: ComponentConfig) -> SourceConfig:
    """Return what a component reads, without its share."""
    return SourceConfig(**{field.name: getattr(component, field.name) for field in fields(SourceConfig)})


def write_mixture(folder: Path, weights: dict[str, float]) -> None:
    """Write down which prepared folders below this one make a mixture."""
    write_atomically(folder / MIXTURE, json.dumps({"weights": weights}, indent=1) + "\n")


def open_folder(path: Path) -> dict[str, tuple[Prepared, float]]:
    """Read the manifest of each component below a folder.

    Returns:
        By the component's name, with its weight; one without a name where the folder is no mixture.

    Raises:
        DataError: If it was not prepared, or is damaged.
    """
    file = path / MIXTURE
    if (path / MANIFEST).exists() or not file.exists():
        return {"": (open_prepared(path), 1.0)}
    try:
        weights = {str(name): float(weight) for name, weight in json.loads(file.read_text())["weights"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{file} is damaged: {error}\n  Prepare {path} anew") from error
    return {name: (open_prepared(path / name), weight) for name, weight in weights.items()}


def check_tokenizer(prepared: Prepared, tokenizer: Tokenizer) -> None:
    """See that documents were tokenised with this tokenizer.

    Raises:
        DataError: If not.
    """
    if prepared.tokenizer != tokenizer.fingerprint:
        raise DataError(
            f"{prepared.path} was prepared with the tokenizer {prepared.tokenizer[:12]} of {prepared.vocab_size:,} "
            f"tokens, but this run has {tokenizer.fingerprint[:12]} of {tokenizer.n_tokens:,}\n"
            "  Try  tokenizer=...   that it was prepared with, or prepare it anew:  "
            "python -m titan.prepare --to DIR data=... tokenizer=..."
        )


def _open(config: SourceConfig, tokenizer: Tokenizer) -> dict[str, tuple[Prepared, float]]:
    assert config.path is not None, "checked before anything was started"
    found = open_folder(Path(config.path))
    for prepared, _ in found.values():
        check_tokenizer(prepared, tokenizer)
    return found
