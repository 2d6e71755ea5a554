"""Rules on what a run reads: its documents are there, and nothing is said of them that is not read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

from titan.config.files import COMPRESSIONS, SUFFIXES, NotReadable, find_files, find_standard_library
from titan.config.schema import (
    BadDocuments,
    DataConfig,
    DataKind,
    RecordFormat,
    SourceConfig,
    TitanConfig,
    TokenizerConfig,
)
from titan.errors import Problem

_WITHOUT = {"data": "data=python_stdlib", "validation.data": "validation=none"}
"""What one types to do without the files of a node."""


def sources_of(data: DataConfig) -> dict[str, SourceConfig]:
    """Return what is read, by its node in the config: the components of a mixture, or else the one source."""
    if data.kind is not DataKind.mixture:
        return {"data": data}
    return {f"data.components.{name}": component for name, component in data.components.items()}


def files_of(source: SourceConfig) -> list[Path]:
    """Return the files of a source that is nothing but files; none for a dataset, and for what is prepared.

    Raises:
        NotReadable: At one that may not be read.
    """
    if source.kind is DataKind.python_stdlib:
        return find_standard_library()
    return find_files(source.path, source.kind.name) if source.kind.name in SUFFIXES and source.path else []


def manifests_of(path: str) -> list[Path]:
    """Return the manifests of what is prepared in a folder: one, or one for each component of a mixture."""
    return sorted([*Path(path).glob("manifest.json"), *Path(path).glob("*/manifest.json")])


def check_data(config: TitanConfig) -> Iterator[Problem]:
    """The text is there, all of it where it is a mixture."""
    data = config.data
    for key, part in sources_of(data).items():
        if data.streaming and part.kind is DataKind.prepared:
            yield Problem(
                f"data.streaming = true, but {key} is prepared",
                "Streaming tokenises while training; what is prepared has its tokens.",
                "data.streaming=false",
            )
    if data.kind is not DataKind.mixture:
        if data.components:
            names = ", ".join(data.components)
            yield Problem(
                f"data.components has {names}, but data={data.kind.name} is no mixture",
                suggestion="data=mixture",
            )
        yield from check_source(data, "data", config.tokenizer)
        return
    for key in ("path", "dataset", "subset", "revision"):
        if getattr(data, key) is not None:
            yield Problem(
                f"data.{key} = {getattr(data, key)} is set, but data=mixture reads its components",
                suggestion=f"data.components.NAME.{key}={getattr(data, key)}",
            )
    if not data.components:
        yield Problem(
            "data=mixture, but data.components has none",
            "Each has a name, a kind, what that needs, and a weight.",
            "'+data.components.NAME={kind:text,path:/path/to/files,weight:0.3}'",
        )
    for name, part in data.components.items():
        key = f"data.components.{name}"
        if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name):
            yield Problem(
                f"{key}: {name!r} is not a name",
                "It names a folder: letters, digits, _ and -.",
                f"data.components.{re.sub(r'[^A-Za-z0-9_-]', '_', name).strip('_-') or 'text'}",
            )
        if part.weight < 0:
            yield Problem(f"{key}.weight = {part.weight} is below 0", suggestion=f"{key}.weight=1.0")
        if part.kind is DataKind.mixture:
            yield Problem(
                f"{key}.kind = mixture, but a mixture's components are no mixtures",
                "Their components can be named here, each with its own weight.",
                f"{key}.kind=text",
            )
        else:
            yield from check_source(part, key, config.tokenizer)
    if data.components and not any(part.weight > 0 for part in data.components.values()):
        total = math.fsum(part.weight for part in data.components.values())
        yield Problem(
            f"the weights of data.components sum to {total:g}",
            "A component's share of the rows is its weight beside the sum of all.",
            f"data.components.{next(iter(data.components))}.weight=1.0",
        )


_FILES = {
    DataKind.text: "",
    DataKind.jsonl: "/*.jsonl",
    DataKind.parquet: "/*.parquet",
    DataKind.arrow: "/*.arrow",
}
"""Kinds that read data.path, each with what one types behind a folder."""
_LONGEST_LINE = 1 << 20
"""Bytes of a file's first line that are looked at before a run."""


def check_source(source: SourceConfig, key: str, tokenizer: TokenizerConfig) -> Iterator[Problem]:
    """One source is there, and nothing is said of it that it does not read.

    Args:
        source: Documents; no mixture.
        key: Its node in the config.
        tokenizer: What prepared documents have to be tokenised with.
    """
    kind = source.kind
    choose = {"data": "data=", "validation.data": "validation="}.get(key, f"{key}.kind=")
    if kind is not DataKind.huggingface:
        for name in ("dataset", "subset", "revision"):
            if (value := getattr(source, name)) is not None:
                yield Problem(
                    f"{key}.{name} = {value} is set, but {choose}{kind.name} reads no dataset of the hub",
                    suggestion=f"{choose}huggingface {key}.dataset={source.dataset or 'owner/name'}",
                )
    if source.format is RecordFormat.chat and kind in (DataKind.text, DataKind.python_stdlib):
        yield Problem(
            f"{key}.format = chat, but {choose}{kind.name} has no records with messages",
            suggestion=f"{choose}jsonl   or  {key}.format=text",
        )
    if kind in _FILES:
        yield from _check_files(source, key, choose)
    elif kind is DataKind.prepared:
        yield from _check_prepared(source, key, choose, tokenizer)
    elif source.path is not None:
        reads = "Python's own sources" if kind is DataKind.python_stdlib else f"{key}.dataset"
        other = f"{choose}text {key}.path={source.path}"
        if kind is DataKind.huggingface:
            other = f"{key}.path=null {key}.dataset={source.dataset or source.path}"
        yield Problem(
            f"{key}.path = {source.path} is set, but {choose}{kind.name} reads {reads}",
            suggestion=other,
        )
    if kind is DataKind.huggingface:
        yield from _check_dataset(source, key, choose)


def _check_files(source: SourceConfig, key: str, choose: str) -> Iterator[Problem]:
    kind = source.kind
    if not source.path:
        yield Problem(
            f"{key}.path is not set, but {choose}{kind.name} needs it",
            suggestion=f"{key}.path=/path/to/files{_FILES[kind]}",
        )
        return
    without = _WITHOUT.get(key, f"{key}.kind=python_stdlib")
    try:
        files = files_of(source)
    except NotReadable as error:
        yield Problem(f"{key}.path = {source.path}: {error.what}", suggestion=error.suggestion)
        return
    if not files:
        exists = Path(source.path).is_dir()
        yield Problem(
            f"{key}.path = {source.path} {'holds no file to read' if exists else 'does not exist or matches nothing'}",
            f"{choose}{kind.name} takes a file, a folder or a glob such as "
            f"'/path/**{_FILES[kind] or '/*.txt'}{'.gz' if kind is DataKind.jsonl else ''}'.",
            f"{key}.path=/path/to/files   or  {without}",
        )
    elif not any(file.stat().st_size for file in files):
        yield Problem(
            f"{key}.path = {source.path} holds {len(files)} file{'s' * (len(files) > 1)}, all of them empty",
            suggestion=f"{key}.path=/path/to/files   or  {without}",
        )
    elif kind is not DataKind.text and (other := _other_kind(files, kind)) is not None:
        yield Problem(
            f"{key}.path = {source.path} holds {other} by its name, but {choose}{kind.name} reads none",
            f"The first file is {files[0]}.",
            f"{choose}{other}",
        )
    elif kind is DataKind.jsonl and source.bad_documents is BadDocuments.error:
        yield from _check_first_record(files[0], source, key)


def _other_kind(files: list[Path], kind: DataKind) -> str | None:
    """Return which other kind all files are of, by their names; None where they may be of this one."""

    def is_named(file: Path, suffixes: tuple[str, ...]) -> bool:
        plain = Path(file.stem) if file.suffix in COMPRESSIONS else file
        return plain.suffix in suffixes

    others = (name for name, suffixes in SUFFIXES.items() if suffixes and name != kind.name)
    return next((name for name in others if all(is_named(file, SUFFIXES[name]) for file in files)), None)


def _check_first_record(file: Path, source: SourceConfig, key: str) -> Iterator[Problem]:
    """The first record has the field that is read, where one line of a plain file tells; the rest is for the run."""
    if file.suffix in COMPRESSIONS:
        return
    name = "messages_field" if source.format is RecordFormat.chat else "text_field"
    field, wanted = getattr(source, name), list if source.format is RecordFormat.chat else str
    try:
        with file.open("rb") as stream:
            record = json.loads(stream.readline(_LONGEST_LINE))
    except (OSError, ValueError, RecursionError):  # which the run will say in full
        return
    if not isinstance(record, dict) or field in record:
        return
    others = sorted(
        (each for each, value in record.items() if isinstance(value, wanted)), key=lambda e: -len(record[e])
    )
    yield Problem(
        f"{key}.{name} = {field}, but the first record of {file} has no such field",
        f"It has: {', '.join(map(str, record))}",
        "   or  ".join(f"{key}.{name}={each}" for each in others[:3]) or f"{key}.{name}=...",
    )


def _check_dataset(source: SourceConfig, key: str, choose: str) -> Iterator[Problem]:
    dataset = source.dataset
    if not dataset:
        yield Problem(
            f"{key}.dataset is not set, but {choose}huggingface needs it",
            suggestion=f"{key}.dataset=owner/name   or  {key}.dataset=/path/to/a/saved/dataset",
        )
    elif not Path(dataset).is_dir() and (dataset[0] in "./~" or dataset.count("/") > 1):
        yield Problem(
            f"{key}.dataset = {dataset} is not a folder, and no name of the hub",
            "There it is owner/name.",
            f"{key}.dataset=owner/name   or  {key}.dataset=/path/to/a/saved/dataset",
        )


def _check_prepared(source: SourceConfig, key: str, choose: str, tokenizer: TokenizerConfig) -> Iterator[Problem]:
    anew = f"python -m titan.prepare --to {source.path or 'DIR'} data=... tokenizer=..."
    if not source.path:
        yield Problem(
            f"{key}.path is not set, but {choose}prepared needs it",
            "It is a folder that titan.prepare wrote.",
            f"{anew}   and then  {key}.path=DIR",
        )
        return
    folder = Path(source.path)
    manifests = manifests_of(source.path)
    if not manifests:
        yield Problem(
            f"{key}.path = {source.path} {'has no manifest.json' if folder.is_dir() else 'is not a folder'}",
            "Preparing writes it last, when all is there.",
            anew,
        )
        return
    for manifest in manifests:
        try:
            made_with = json.loads(manifest.read_text()).get("tokenizer")
        except (OSError, ValueError, AttributeError):  # which the run will say in full
            continue
        if tokenizer.fingerprint is not None and made_with != tokenizer.fingerprint:
            yield Problem(
                f"{key}.path = {source.path} was prepared with another tokenizer than tokenizer={tokenizer.kind.name}",
                f"Its fingerprint is {str(made_with)[:12]}, that of this one {tokenizer.fingerprint[:12]}.",
                f"tokenizer=...   that it was prepared with, or  {anew}",
            )
