"""Documents, one after the other, always in the same order: which shards a config stands for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from titan.config.files import find_files
from titan.config.schema import DataKind, SourceConfig
from titan.config.sources import files_of
from titan.data.file_source import file_shards
from titan.data.shard import Content, Document, Shard
from titan.errors import DataError

__all__ = ["Content", "Document", "Shard", "Source", "open_source"]


@dataclass
class Source:
    """The documents of a data config, in shards that can be read apart from each other."""

    config: SourceConfig
    shards: list[Shard]
    """Always in the same order."""
    files: list[Path] = field(default_factory=list)
    """What is read, where that is files."""

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents of all shards in their order."""
        for shard in self.shards:
            yield from shard.read()

    @property
    def documents(self) -> int:
        """How many documents were read."""
        return sum(shard.documents for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        """Bytes of the text that was read, in UTF-8."""
        return sum(shard.text_bytes for shard in self.shards)

    @property
    def skipped(self) -> Counter[str]:
        """Documents left out, by reason."""
        return sum((shard.skipped for shard in self.shards), Counter())


def open_source(config: SourceConfig, streaming: bool = False) -> Source:
    """Return the documents that a config stands for.

    Args:
        config: What to read.
        streaming: Whether a dataset of the hub is read while it is fetched, instead of after.

    Raises:
        DataError: If there is nothing to read, or the dataset cannot be had.
    """
    if config.kind in (DataKind.huggingface, DataKind.parquet, DataKind.arrow):
        from titan.data.table_source import open_tables  # which takes seconds to import

        files = [] if config.kind is DataKind.huggingface else source_files(config)
        shards = open_tables(config, files, streaming)
        return Source(config, shards, files)
    files = source_files(config)
    return Source(config, file_shards(config, files), files)


def source_files(config: SourceConfig) -> list[Path]:
    """Return the files that a config stands for, sorted; those of a dataset in a local folder too.

    Raises:
        DataError: If there is none.
    """
    if config.kind is DataKind.huggingface:
        assert config.dataset is not None, "checked before anything was started"
        return find_files(config.dataset, "text") if Path(config.dataset).is_dir() else []
    files = files_of(config)
    if not files:
        raise DataError(f"no files to read for data={config.kind.name}, data.path={config.path}")
    return files
