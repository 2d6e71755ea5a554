"""Documents from tables: parquet, Arrow, every dataset of the hub. The one door to `datasets` and to pyarrow.

Files are read as they are, row group by row group; nothing is copied into the hub's cache. A dataset of the hub is
fetched into that cache and read from there in ranges of rows, or, streaming, read while it is fetched.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titan.config.schema import BadDocuments, DataKind, SourceConfig
from titan.data.shard import Document, Shard, field_of, gist, is_damage, no_field
from titan.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from pyarrow import RecordBatch, Table

RANGE_BYTES = 64 << 20
"""About as much as is in a range of rows; a change changes where every document is found."""
_BATCH_ROWS = 1000


def open_tables(config: SourceConfig, files: list[Path], streaming: bool) -> list[Shard]:
    """Return the shards of a table, always in the same order.

    Args:
        config: What to read.
        files: Parquet or Arrow files; none for a dataset of the hub.
        streaming: Whether a dataset of the hub is read while it is fetched.

    Raises:
        DataError: If a file is none of its kind, or the dataset, its subset, its split or its field is not there.
    """
    if config.kind is not DataKind.huggingface:
        folder = Path(config.path or "")
        if config.kind is DataKind.arrow and _is_saved(folder):
            return _ranges(config, str(folder), _load_saved(config, folder))
        return [shard for file in files for shard in _file_shards(config, file)]
    assert config.dataset is not None, "checked before anything was started"
    name = f"{config.dataset}/{config.split}"
    if _is_saved(Path(config.dataset)):
        return _ranges(config, name, _load_saved(config, Path(config.dataset)))
    found = _load_hub(config, streaming)
    return _parts(config, name, found) if streaming else _ranges(config, name, found)


@dataclass
class RangeShard(Shard):
    """Some rows of a dataset that lies on this machine's disk."""

    rows: Dataset | None = None
    begin: int = 0
    end: int = 0
    where: str = ""

    def locate(self, record: int) -> str:
        """Return the dataset and the row in it, from 0."""
        return f"{self.where}, row {self.begin + record:,}"

    def _read(self, start: int) -> Iterator[Document]:
        assert self.rows is not None
        table = self.rows.with_format("arrow")
        for at in range(self.begin + start, self.end, _BATCH_ROWS):
            batch = table[at : min(at + _BATCH_ROWS, self.end)]
            yield from _documents(self, batch, at - self.begin)


@dataclass
class PartShard(Shard):
    """A part of a dataset that can only be read from its beginning on: a file's row group, or some files."""

    rows: IterableDataset | None = None
    where: str = ""

    def locate(self, record: int) -> str:
        """Return the file or the dataset, and the row in it, from 0."""
        return f"{self.where}, row {record:,}"

    def _after(self, rows: int) -> str:
        return f"{self.where}, after row {rows:,}"

    def _batches(self, start: int) -> Iterator[Table | RecordBatch]:
        """Yield the rows from `start` on."""
        assert self.rows is not None
        rows = self.rows.skip(start) if start else self.rows
        yield from rows.with_format("arrow").iter(batch_size=_BATCH_ROWS)

    def _read(self, start: int) -> Iterator[Document]:
        at, batches = start, self._batches(start)
        while True:
            try:
                batch = next(batches, None)
            except Exception as error:  # of pyarrow's, of the hub's client, or of the network
                self.refuse_rest(at, partial(self._after, at), error)
                return
            if batch is None:
                return
            yield from _documents(self, batch, at)
            at += batch.num_rows


@dataclass
class RowGroupShard(PartShard):
    """A row group of a parquet file that lies here."""

    path: Path = Path()
    row_group: int = 0

    def _batches(self, start: int) -> Iterator[RecordBatch]:
        import pyarrow.parquet

        columns, groups = [field_of(self.config)], [self.row_group]
        with pyarrow.parquet.ParquetFile(self.path) as file:
            for batch in file.iter_batches(_BATCH_ROWS, groups, columns, use_threads=False):
                if start < batch.num_rows:
                    yield batch.slice(start)
                start = max(0, start - batch.num_rows)


def _documents(shard: Shard, batch: Table | RecordBatch, first: int) -> Iterator[Document]:
    """Yield the documents of a shard's share of a batch; the others' rows are never made into text."""
    names = batch.schema.names
    field = field_of(shard.config)
    column = batch.column(field) if field in names else None
    for record in shard.records_of_share(first, first + batch.num_rows):
        try:
            values = dict.fromkeys(names) if column is None else {field: column[record - first].as_py()}
        except UnicodeDecodeError as error:
            shard.refuse(record, f"not UTF-8 ({error.reason} at byte {error.start})", "not UTF-8")
            continue
        yield from shard.pick(values, record)


def _ranges(config: SourceConfig, name: str, rows: Dataset) -> list[Shard]:
    _check_field(config, name, rows.column_names)
    rows = rows.select_columns([field_of(config)])
    bytes_per_row = max(1, rows.data.nbytes // max(1, rows.data.num_rows))
    step = max(1, RANGE_BYTES // bytes_per_row)
    return [
        RangeShard(
            config,
            f"{name}[{begin}:{min(begin + step, len(rows))}]",
            bytes_per_row * (min(begin + step, len(rows)) - begin),
            rows=rows,
            begin=begin,
            end=min(begin + step, len(rows)),
            where=name,
        )
        for begin in range(0, len(rows), step)
    ]


def _file_shards(config: SourceConfig, file: Path) -> list[Shard]:
    """Return a parquet file's row groups, or an Arrow file as it is."""
    try:
        columns, shards = _open_parquet(config, file) if config.kind is DataKind.parquet else _open_arrow(config, file)
    except Exception as error:  # of pyarrow's
        unreadable = UnreadableShard(config, str(file), 0)
        if not is_damage(error):
            raise DataError(f"{file} cannot be read: {gist(error)}") from error
        unreadable.refuse_at(lambda: str(file), f"no {config.kind.name} file ({gist(error)})", "unreadable file")
        return [unreadable]
    _check_field(config, str(file), columns)
    return shards


def _open_parquet(config: SourceConfig, file: Path) -> tuple[list[str], list[Shard]]:
    """Return the columns, and a shard for each row group.

    Without `datasets`, which takes 100 times as long for a file, and of those there are thousands.
    """
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as opened:
        columns, count = opened.schema_arrow.names, opened.num_row_groups
    size = file.stat().st_size
    if count == 1:
        return columns, [RowGroupShard(config, str(file), size, where=str(file), path=file)]
    return columns, [
        RowGroupShard(
            config,
            f"{file}[{index} of {count}]",
            size // count,
            where=f"{file}, row group {index}",
            path=file,
            row_group=index,
        )
        for index in range(count)
    ]


def _open_arrow(config: SourceConfig, file: Path) -> tuple[list[str], list[Shard]]:
    size = file.stat().st_size
    with _datasets() as datasets:
        rows = datasets.load_dataset("arrow", data_files=[str(file)], split="train", streaming=True)
    columns, name = list(rows.column_names), field_of(config)
    if name in columns:
        rows = rows.select_columns([name])
    return columns, [PartShard(config, str(file), size, rows=rows, where=str(file))]


@dataclass
class UnreadableShard(Shard):
    """A file that is none of its kind, where such are to be skipped."""

    def _read(self, start: int) -> Iterator[Document]:
        if self.is_in_share(0):
            self.skipped["unreadable file"] += 1
        yield from ()


def _parts(config: SourceConfig, name: str, rows: IterableDataset) -> list[Shard]:
    if rows.column_names is not None:
        _check_field(config, name, rows.column_names)
        rows = rows.select_columns([field_of(config)])
    count = rows.num_shards
    return [
        PartShard(
            config,
            f"{name}[{index} of {count}]",
            RANGE_BYTES,
            rows=rows.shard(num_shards=count, index=index),
            where=f"{name}, part {index} of {count}",
        )
        for index in range(count)
    ]


def _check_field(config: SourceConfig, where: str, columns: list[str]) -> None:
    """Hold a table without the field for a mistake, whatever is to become of bad documents: there would be none."""
    name = field_of(config)
    if name not in columns:
        shard = Shard(replace(config, bad_documents=BadDocuments.error), where, 0)
        shard.refuse_at(lambda: where, no_field(name, columns), "", shard.naming)


def _is_saved(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _load_saved(config: SourceConfig, folder: Path) -> Dataset:
    with _datasets() as datasets:
        try:
            found = datasets.load_from_disk(str(folder))
        except Exception as error:  # of pyarrow's, or about its JSON
            raise DataError(f"{folder}: no saved dataset ({gist(error)})") from error
    if isinstance(found, dict):
        if config.split not in found:
            raise _no_split(config.split, str(folder), list(found))
        return found[config.split]
    return found


def _load_hub(config: SourceConfig, streaming: bool) -> Any:
    with _datasets() as datasets:
        try:
            return datasets.load_dataset(
                config.dataset, config.subset, revision=config.revision, split=config.split, streaming=streaming
            )
        except Exception as error:  # of the hub's client, of the network, or of pyarrow's
            raise _explain(config, error) from error


def _explain(config: SourceConfig, error: Exception) -> DataError:
    """Return what is wrong with a dataset of the hub, and what to type instead."""
    text, dataset = str(error), config.dataset
    names = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, ValueError) and "split" in text and (found := re.search(r"\[(.*)\]", text)):
        return _no_split(config.split, str(dataset), re.findall(r"'([^']+)'", found.group(1)))
    if "BuilderConfig" in text or "Config name is missing" in text:
        listed = re.findall(r"'([^']+)'", (re.search(r"\[(.*)\]", text, re.DOTALL) or [text, text])[1])
        what = f"data.subset = {config.subset or 'null'} is none of {dataset}'s"
        return DataError(
            f"{what}\n  There are: {', '.join(listed[:20])}\n  Try  data.subset={listed[0] if listed else 'NAME'}"
        )
    if "gated" in text or "GatedRepoError" in names:
        return DataError(
            f"data.dataset = {dataset} is gated: its page on the hub asks for an agreement\n"
            "  Try  export HF_TOKEN=...   of an account that has agreed"
        )
    if "RevisionNotFoundError" in names or "evision" in text:
        return DataError(
            f"data.revision = {config.revision} is no commit, branch or tag of {dataset}\n  Try  data.revision=main"
        )
    if names & {"DatasetNotFoundError", "HFValidationError", "RepositoryNotFoundError"}:
        return DataError(
            f"data.dataset = {dataset} is neither a folder here nor a dataset of the hub that this account may see\n"
            "  Try  data.dataset=owner/name   or, if it is private,  export HF_TOKEN=..."
        )
    if names & {"ConnectionError", "OfflineModeIsEnabled", "HTTPError", "TransportError", "HfHubHTTPError"}:
        return DataError(
            f"data.dataset = {dataset} cannot be fetched: the hub does not answer ({gist(error)})\n"
            "  Fetch it where there is a network, and try  data.dataset=/path/to/its/folder"
        )
    return DataError(f"data.dataset = {dataset} cannot be read: {gist(error)}")


def _no_split(split: str, where: str, splits: list[str]) -> DataError:
    try_this = f"data.split={splits[0]}" if splits else "data.split=NAME"
    return DataError(
        f"data.split = {split} is no split of {where}\n  There are: {', '.join(splits)}\n  Try  {try_this}"
    )


@contextlib.contextmanager
def _datasets() -> Iterator[Any]:
    """Import the library, and keep what it and the hub's client would say on the console out of it."""
    import datasets

    level = datasets.logging.get_verbosity()
    hub = logging.getLogger("huggingface_hub")
    hub_level = hub.level
    datasets.logging.set_verbosity(logging.CRITICAL)
    hub.setLevel(logging.CRITICAL)
    had_bars = datasets.are_progress_bars_disabled()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield datasets
    finally:
        datasets.logging.set_verbosity(level)
        hub.setLevel(hub_level)
        if not had_bars:
            datasets.enable_progress_bars()
