"""Weights from another format into a titan checkpoint, and out of one.

What is written is written beside its place and renamed when it is complete and was held against its source, so there
is nothing under the final name that is not right. Tensors go through memory one at a time.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from titan.checkpoint.files import TensorInfo, write_tensors
from titan.checkpoint.hugging_face import CONFIG, read_json, to_halves
from titan.checkpoint.hugging_face_config import TOKEN_KEYS, to_hugging_face_config
from titan.checkpoint.manifest import FileRecord, Manifest, commit, record_of_file, sync_folder, versions
from titan.checkpoint.shards import write_json, write_shards
from titan.checkpoint.torch_file import TorchFile, config_content, write_torch_file
from titan.checkpoint.weights import Weights, check_usable, expect_shapes
from titan.config.load import model_text
from titan.config.schema import ModelConfig
from titan.convert.describe import size_text
from titan.convert.sources import HUGGING_FACE, TITAN, Source, family_of
from titan.convert.verification import Say, check_hugging_face, check_import, check_same
from titan.errors import CommandError, StorageError
from titan.run_directory import short_path, unique_temporary, utc_now, write_synced

TOKENIZER = "tokenizer"
"""The folder of a checkpoint with the files that go with the weights unchanged."""
GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("chat_template.jinja", GENERATION),
)


def import_weights(source: Source, destination: Path, is_verified: bool, say: Say) -> None:
    """Make a titan checkpoint of weights in another format.

    Args:
        source: The weights, with the model's shape.
        destination: The checkpoint's folder, which must not be there yet.
        is_verified: Compare what was written with the source before it gets its name.
        say: Prints a line.

    Raises:
        CheckpointError: If the weights are not those of a model of this shape.
        CommandError: If the command is not for this source or destination.
        Disagreement: If the comparison fails; nothing is left then.
        StorageError: If it cannot be written.
    """
    if source.kind == TITAN:
        raise CommandError(f"{source.path} is a titan checkpoint already\n  Try  checkpoint.initial_load={source.path}")
    config = source.config
    if config is None:
        raise CommandError(
            f"{source.path} does not say of which shape its model is\n"
            "  Try  model=llama3_8b   behind the command, with model.dim=... and so on where it differs"
        )
    shapes = family_of(config).parameter_shapes(config)
    check_usable(source.path, expect_shapes(source.weights.infos(), shapes, {name: name for name in shapes}))
    say(describe_source(source))
    began = time.monotonic()
    with written_beside(destination) as temporary:
        temporary.mkdir()
        files = _write_checkpoint(source, config, temporary)
        if is_verified:
            check_import(source, config, temporary, say)
        manifest = Manifest(
            step=source.step,
            tokens=source.tokens,
            content=source.content,
            run="",
            files=files,
            versions=versions(),
            time=utc_now(),
        )
        commit(temporary, destination, manifest)
    say(f"written  {short_path(destination)}: {size_text(manifest.bytes)} in {time.monotonic() - began:.1f} s")


def export_hugging_face(
    source: Source,
    destination: Path,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    is_verified: bool,
    say: Say,
) -> None:
    """Make a folder of a titan checkpoint that the transformers library loads.

    Args:
        source: A titan checkpoint.
        destination: The folder, which must not be there yet.
        dtype: The format to round the weights to; None keeps theirs.
        max_shard_bytes: The largest size of one file.
        is_verified: Compare what was written with the source before it gets its name.
        say: Prints a line.

    Raises:
        CheckpointError: If the checkpoint is damaged.
        Disagreement: If the comparison fails; nothing is left then.
        StorageError: If it cannot be written.
    """
    config = _check_exportable(source, say)
    began = time.monotonic()
    with written_beside(destination) as temporary:
        temporary.mkdir()
        _write_hugging_face(source, config, temporary, dtype, max_shard_bytes)
        if is_verified:
            check_hugging_face(source, config, temporary, dtype, say)
        size = sum(path.stat().st_size for path in temporary.iterdir())
        _put_in_place(temporary, destination)
    say(f"written  {short_path(destination)}: {size_text(size)} in {time.monotonic() - began:.1f} s")


def export_torch(
    source: Source, destination: Path, dtype: torch.dtype | None, content: str, is_verified: bool, say: Say
) -> None:
    """Make one file of torch.save of a titan checkpoint; arguments and errors as for `export_hugging_face`.

    Args:
        source: A titan checkpoint.
        destination: The file.
        dtype: The format to round the weights to; None keeps theirs. The optimizer's state is never rounded.
        content: all takes the optimizer's state along; weights does not.
        is_verified: Read every tensor back.
        say: Prints a line.
    """
    config = _check_exportable(source, say)
    if content == "all" and source.optimizer is None:
        raise CommandError(f"--content all: {source.path} has no optimizer state\n  Try  --content weights")
    began = time.monotonic()
    parts = {"model": _Rounded(source.weights, dtype)}
    if content == "all" and source.optimizer is not None:
        parts["optimizer"] = _Rounded(source.optimizer, None)
    more = {"step": source.step, "tokens": source.tokens, "config": config_content(config)}
    with written_beside(destination) as temporary:
        write_torch_file(
            temporary,
            {part: weights.infos() for part, weights in parts.items()},
            lambda part, name: parts[part].read(name),
            more,
        )
        if is_verified:
            file = TorchFile(temporary)
            check_same(parts["model"], file.model, say)
            if "optimizer" in parts and file.optimizer is not None:
                check_same(parts["optimizer"], file.optimizer, say)
        size = temporary.stat().st_size
        _put_in_place(temporary, destination)
    say(f"written  {short_path(destination)}: {size_text(size)} in {time.monotonic() - began:.1f} s")


def describe_source(source: Source) -> str:
    """Return one line about weights; further ones for what had to be assumed."""
    infos = source.weights.infos()
    numbers = sum(info.shape.numel() for info in infos.values())
    formats = ", ".join(sorted({str(info.dtype).removeprefix("torch.") for info in infos.values()}))
    line = f"source   {source.kind} {short_path(source.path)}: {len(infos)} tensors, {numbers:,} parameters, {formats}"
    return "\n".join([line, *(f"note     {note}" for note in source.notes)])


def check_free(destination: Path) -> None:
    """Refuse a destination that something is at.

    Raises:
        CommandError: If there is.
    """
    if destination.exists() or destination.is_symlink():
        raise CommandError(f"{destination} is there already\n  Try  another name, or remove it first")


@contextlib.contextmanager
def written_beside(destination: Path) -> Iterator[Path]:
    """Give a path beside the final one; what is still there at the end is removed.

    Raises:
        CommandError: If something has the final name already.
        StorageError: If the system cannot write.
    """
    check_free(destination)
    temporary = unique_temporary(destination.absolute())
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
    except OSError as error:
        raise StorageError(f"{destination} cannot be written: {error}") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


class _Rounded:
    """Weights in another format of numbers."""

    def __init__(self, weights: Weights, dtype: torch.dtype | None) -> None:
        self.weights, self.dtype = weights, dtype

    def infos(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo(info.shape, self.dtype or info.dtype) for name, info in self.weights.infos().items()}

    def read(self, name: str, rows: range | None = None, columns: range | None = None) -> Tensor:
        tensor = self.weights.read(name, rows, columns)
        return tensor if self.dtype is None else tensor.to(self.dtype)


def _write_checkpoint(source: Source, config: ModelConfig, folder: Path) -> dict[str, FileRecord]:
    parts = {"model.": source.weights} | ({"optimizer.": source.optimizer} if source.optimizer is not None else {})
    state = {
        prefix + name: torch.empty(info.shape, dtype=info.dtype, device="meta")
        for prefix, weights in parts.items()
        for name, info in weights.infos().items()
    }

    def resolve(name: str) -> Tensor:
        prefix, _, rest = name.partition(".")
        return parts[prefix + "."].read(rest)

    files = write_tensors(state, folder, resolve=resolve, release=True)
    write_synced(folder / "config.yaml", model_text(config))
    copied = _keep_tokenizer(source, folder)
    for name in copied:
        _sync_file(folder / name)
    return files | {name: record_of_file(folder / name) for name in ["config.yaml", *copied]}


def _keep_tokenizer(source: Source, folder: Path) -> list[str]:
    """Copy what belongs to the weights of a Hugging Face folder; returns the names in the checkpoint."""
    if source.kind != HUGGING_FACE:
        return []
    kept = folder / TOKENIZER
    kept.mkdir()
    for name in TOKENIZER_FILES:
        if (source.path / name).is_file():
            shutil.copyfile(source.path / name, kept / name)
    # transformers takes what is not in this file from config.json, of which titan keeps the model's shape alone.
    tokens = {key: value for key, value in read_json(source.path / CONFIG).items() if key in TOKEN_KEYS}
    tokens = {key: value for key, value in tokens.items() if value is not None}
    if tokens and not (kept / GENERATION).is_file():
        write_json(kept / GENERATION, tokens)
    names = [f"{TOKENIZER}/{path.name}" for path in sorted(kept.iterdir())]
    if not names:
        kept.rmdir()
    return names


def _check_exportable(source: Source, say: Say) -> ModelConfig:
    if source.kind != TITAN or source.manifest is None or source.config is None:
        raise CommandError(
            f"{source.path} is no titan checkpoint but a {source.kind}\n"
            f"  Try  python -m titan.convert import {source.path} CHECKPOINT   and export that"
        )
    family_of(source.config)
    say(describe_source(source))
    check_usable(source.path, source.manifest.damage(source.path))
    return source.config


def _write_hugging_face(
    source: Source, config: ModelConfig, folder: Path, dtype: torch.dtype | None, max_shard_bytes: int
) -> None:
    family, weights = family_of(config), _Rounded(source.weights, dtype)
    names = {family.hugging_face_name(name): name for name in family.parameter_shapes(config)}

    def read(called: str) -> Tensor:
        tensor = weights.read(names[called])
        return to_halves(tensor, config.dim // config.n_heads) if family.is_rotary(names[called]) else tensor

    infos = weights.infos()
    write_shards(folder, {called: infos[name] for called, name in names.items()}, read, max_shard_bytes)
    manifest = source.manifest
    kept = [name for name in TOKENIZER_FILES if manifest is not None and f"{TOKENIZER}/{name}" in manifest.files]
    for name in kept:
        shutil.copyfile(source.path / TOKENIZER / name, folder / name)
        _sync_file(folder / name)
    tokens = read_json(folder / GENERATION) if GENERATION in kept else {}
    write_json(folder / CONFIG, to_hugging_face_config(config, infos["tok_embeddings.weight"].dtype, tokens))
    sync_folder(folder)


def _put_in_place(temporary: Path, destination: Path) -> None:
    if temporary.is_file():
        _sync_file(temporary)
    temporary.rename(destination)
    sync_folder(destination.absolute().parent)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
