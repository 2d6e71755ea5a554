"""What is in weights of any format, without reading a tensor."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from titan.convert.sources import Source
from titan.run_directory import short_path

LARGEST = 5
"""Tensors that are listed."""
_GROUPS = {
    "embedding": r"tok_embeddings\.",
    "attention": r"layers\.\d+\.attention\.",
    "feed-forward": r"layers\.\d+\.feed_forward\.",
    "norms": r"(.*_)?norm\.|layers\.\d+\.\w*norm\.",
    "output": r"output\.",
    "other": "",
}


def describe(source: Source) -> dict[str, Any]:
    """Return what there is as plain data; sizes in bytes, parameters as counts of numbers."""
    infos, manifest = source.weights.infos(), source.manifest
    groups: Counter[str] = Counter()
    for name, info in infos.items():
        groups[_group(name)] += info.shape.numel()
    largest = sorted(infos.items(), key=lambda item: -item[1].bytes)[:LARGEST]
    return {
        "path": str(source.path),
        "kind": source.kind,
        "content": source.content,
        "step": source.step,
        "tokens": source.tokens,
        "run": manifest.run if manifest is not None else "",
        "time": manifest.time if manifest is not None else "",
        "mesh": manifest.mesh if manifest is not None else {},
        "versions": manifest.versions if manifest is not None else {},
        "files": len(manifest.files) if manifest is not None else len(_files(source.path)),
        "bytes": manifest.bytes if manifest is not None else sum(path.stat().st_size for path in _files(source.path)),
        "tensors": len(infos),
        "optimizer_tensors": len(source.optimizer.infos()) if source.optimizer is not None else 0,
        "parameters": sum(groups.values()),
        "groups": {name: groups[name] for name in _GROUPS if groups[name]},
        "dtypes": dict(Counter(format_name(info.dtype) for info in infos.values())),
        "model": asdict(source.config) if source.config is not None else None,
        "largest": [
            {"name": name, "shape": list(info.shape), "dtype": format_name(info.dtype), "bytes": info.bytes}
            for name, info in largest
        ],
        "notes": source.notes,
    }


def format_description(found: dict[str, Any]) -> Iterator[str]:
    """Return it as lines."""
    yield f"{found['kind']}  {short_path(Path(found['path']))}"
    yield f"content     {found['content']}, step {found['step']:,}, {found['tokens']:,} tokens"
    if found["time"]:
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        yield f"saved       {found['time']}" + (f", {versions}" if versions else "")
    if found["run"]:
        yield f"run         {found['run']}"
    if found["mesh"]:
        yield "mesh        " + " x ".join(f"{axis} {degree}" for axis, degree in found["mesh"].items())
    yield f"size        {size_text(found['bytes'])} in {found['files']} file{'s' * (found['files'] != 1)}"
    optimizer = f", and {found['optimizer_tensors']} of the optimizer" if found["optimizer_tensors"] else ""
    formats = ", ".join(f"{count} in {name}" for name, count in found["dtypes"].items())
    yield f"tensors     {found['tensors']}{optimizer}: {formats}"
    yield f"parameters  {found['parameters']:,}"
    for name, count in found["groups"].items():
        yield f"  {name:<14}{count:>20,}  {count / max(1, found['parameters']):6.1%}"
    model = found["model"]
    shape = "not said" if model is None else ", ".join(f"{key} {value}" for key, value in model.items())
    yield from textwrap.wrap(shape, 100, initial_indent="model       ", subsequent_indent=" " * 12)
    yield "largest"
    for each in found["largest"]:
        shape = " x ".join(map(str, each["shape"])) or "one number"
        yield f"  {each['name']:<40}{shape:>18}  {each['dtype']:<9}{size_text(each['bytes']):>12}"
    yield from (f"note        {note}" for note in found["notes"])


def format_name(dtype: object) -> str:
    """Return what a format of numbers is called."""
    return str(dtype).removeprefix("torch.")


def size_text(count: float) -> str:
    """Return a number of bytes for people."""
    if count < 1024:
        return f"{count:.0f} bytes"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 1024 or unit == "GiB":
            break
    return f"{count:,.1f} {unit}"


def _group(name: str) -> str:
    return next(group for group, pattern in _GROUPS.items() if re.match(pattern, name))


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
