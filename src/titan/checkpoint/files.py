"""Tensors on disk, in PyTorch's distributed checkpoint format: written with checksums, read without running code.

The format is PyTorch's, so other tools read it. Two things are titan's:

- Files are checksummed while they are written. The checksums that the format computes, and never looks at, are off.
- `.metadata` is a pickle, which may name any function to call. It is read with a list of the few names that it needs,
  tensors with `weights_only`, and pickled objects not at all.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem
from torch.serialization import get_crc32_options, set_crc32_options

from titan.checkpoint.manifest import FileRecord
from titan.errors import CheckpointError, StorageError

METADATA = ".metadata"
_METADATA_NAMES = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "ChunkStorageMetadata"),
        *("BytesStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
}
"""Everything that the metadata of a checkpoint is made of, dtypes aside."""


@dataclass(frozen=True)
class TensorInfo:
    """A whole tensor's shape and format."""

    shape: torch.Size
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Its size."""
        return self.shape.numel() * self.dtype.itemsize


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _METADATA_NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it wants to call {module}.{name}, which is no part of a checkpoint's metadata")


def read_metadata(folder: Path) -> Metadata:
    """Return PyTorch's metadata of a checkpoint; nothing in it is executed.

    Raises:
        CheckpointError: If there is none, or it is no metadata, or it wants to run something.
    """
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            metadata = _RestrictedUnpickler(file).load()
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a checkpoint: it has no file {METADATA}") from None
    except Exception as error:  # an unpickler fails in any way on any bytes
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{path} holds no metadata of a checkpoint")
    if metadata.storage_meta is None:
        metadata.storage_meta = StorageMeta()
    return metadata


def tensor_infos(metadata: Metadata) -> dict[str, TensorInfo]:
    """Return the tensors that a checkpoint has, by name."""
    return {
        name: TensorInfo(entry.size, entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def write_tensors(
    state: Mapping[str, Tensor],
    folder: Path,
    group: dist.ProcessGroup | None = None,
    resolve: Callable[[str], Tensor] | None = None,
    sync: bool = True,
    release: bool = False,
) -> dict[str, FileRecord]:
    """Write tensors into an empty folder; every rank of the group takes part.

    Args:
        state: By name; a DTensor's parts are written by the ranks that have them, what several have by one.
        folder: To write to.
        group: The ranks; None writes alone, without any.
        resolve: Returns the data that this rank has of a name, on the CPU, where that is not in `state` itself: for
            copies made before, and for what is read from elsewhere only when its turn has come.
        sync: Return only when the disk has the files.
        release: Take the memory of what `resolve` returns back as soon as it is written. Nobody else may use it.

    Returns:
        What this rank has written.

    Raises:
        StorageError: On every rank, if one of them could not write; this rank's own reason, if it is the one.
    """
    writer = _Writer(folder, sync, is_ahead=not release)
    try:
        with _without_crc32(), _quiet(group):
            dcp.save(
                dict(state),
                storage_writer=writer,
                planner=_SavePlanner(resolve, release),
                process_group=group,
                no_dist=group is None,
            )
    except dcp.api.CheckpointException as error:
        raise StorageError(_reason(writer.stream_error or error)) from error
    return writer.written()


def read_tensors(
    state: dict[str, Tensor],
    folder: Path,
    group: dist.ProcessGroup | None = None,
    metadata: Metadata | None = None,
) -> None:
    """Fill tensors from a checkpoint in place; every rank of the group takes part, each reads what it needs.

    Args:
        state: By name; DTensors on any mesh.
        folder: The checkpoint's.
        group: The ranks; None reads alone.
        metadata: The checkpoint's, where it has been read already: of thousands of ranks' pieces it is large.

    Raises:
        CheckpointError: If the folder cannot be read, or does not have them all.
    """
    try:
        with _quiet(group):
            dcp.load(
                state,  # type: ignore[arg-type]
                storage_reader=_Reader(folder, metadata),
                planner=_LoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                process_group=group,
                no_dist=group is None,
            )
    except dcp.api.CheckpointException as error:
        first, _ = next(iter(error.failures.values()))  # of any rank; the others' are in their logs
        raise CheckpointError(f"{folder} cannot be loaded: {_reason(first)}") from error


def read_tensor(folder: Path, name: str, info: TensorInfo, metadata: Metadata | None = None) -> Tensor:
    """Return one whole tensor of a checkpoint, on the CPU."""
    tensor = torch.empty(info.shape, dtype=info.dtype)
    read_tensors({name: tensor}, folder, metadata=metadata)
    return tensor


class _SavePlanner(DefaultSavePlanner):
    """Plans by the tensors' shapes, and takes their data from where it is told."""

    def __init__(self, resolve: Callable[[str], Tensor] | None, release: bool) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.resolve, self.release = resolve, release
        self.before: Tensor | None = None

    def lookup_object(self, index: MetadataIndex) -> Any:
        return super().lookup_object(index) if self.resolve is None else self.resolve(index.fqn)

    def resolve_data(self, write_item: WriteItem) -> Any:
        # PyTorch's writer holds on to every tensor until its file is complete (2.13), which one format of it needs.
        if self.release and self.before is not None:
            self.before.untyped_storage().resize_(0)
        data = super().resolve_data(write_item).detach()
        self.before = data if isinstance(data, Tensor) else None
        return data


class _LoadPlanner(DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        raise CheckpointError(f"{read_item.dest_index.fqn} is a pickled object, which is never loaded")


class _Reader(FileSystemReader):
    def __init__(self, folder: Path, metadata: Metadata | None) -> None:
        super().__init__(folder)
        self.metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_metadata(Path(self.path)) if self.metadata is None else self.metadata


class _Writer(FileSystemWriter):
    """Remembers the checksum of what it writes, and the reason when it cannot."""

    def __init__(self, folder: Path, sync: bool, is_ahead: bool) -> None:
        # 0 asks for a tensor only when the one before it is written; the other is PyTorch's own default.
        super().__init__(folder, sync_files=sync, per_thread_copy_ahead=10_000_000 if is_ahead else 0)
        self.fs = _ChecksummingFiles()

    @property
    def stream_error(self) -> OSError | None:
        """What the system said; PyTorch's writer makes an error of its own of it."""
        return next((stream.error for stream in self.fs.streams.values() if stream.error is not None), None)

    def written(self) -> dict[str, FileRecord]:
        """Return the files that are whole, by their final names."""
        return {Path(path).name: stream.record() for path, stream in self.fs.streams.items()}

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # PyTorch would note the temporary path


class _ChecksummingFiles(FileSystem):
    def __init__(self) -> None:
        self.streams: dict[str, _ChecksummingStream] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        with io.FileIO(path, mode.replace("b", "")) as file:
            stream = self.streams[str(path)] = _ChecksummingStream(file)
            yield stream

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        os.rename(path, new_path)
        self.streams[str(new_path)] = self.streams.pop(str(path))


class _ChecksummingStream(io.RawIOBase):
    """A file to append to."""

    def __init__(self, file: io.FileIO) -> None:
        self.file, self.digest, self.length = file, xxhash.xxh3_128(), 0
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        self.digest.update(rest)
        self.length += len(rest)
        wanted = len(rest)
        try:
            while rest:
                rest = rest[self.file.write(rest) :]
        except OSError as error:
            self.error = error
            raise
        return wanted

    def tell(self) -> int:
        return self.length

    def fileno(self) -> int:
        return self.file.fileno()

    def close(self) -> None:
        """Leave closing to `create_stream`."""

    def record(self) -> FileRecord:
        return FileRecord(self.length, self.digest.hexdigest())


def _reason(error: BaseException) -> str:
    if isinstance(error, dcp.api.CheckpointException):
        error, _ = next(iter(error.failures.values()))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *lines[:1]])


@contextlib.contextmanager
def _without_crc32() -> Iterator[None]:
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


def _quiet(group: dist.ProcessGroup | None) -> contextlib.AbstractContextManager[object]:
    """Keep PyTorch from announcing that it works alone, where that is meant."""
    if group is not None:  # nor may a background thread change what the whole process warns of
        return contextlib.nullcontext()
    quiet = warnings.catch_warnings()
    quiet.__enter__()
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    stack = contextlib.ExitStack()
    stack.push(quiet)
    return stack
