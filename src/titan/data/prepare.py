"""Tokenise a source once, in as many processes as there are cores, and go on where an interruption left it.

Shards of the source are taken together to parts of some size, in their order. Each part is made by one process, under
another name until it is whole. One process of a machine makes a folder; the others wait for its manifest to appear, as
long as a file there says that it lives. Machines that make the same folder on a shared disk share the parts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields
from enum import Enum
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from titan.config.schema import RecordFormat, SourceConfig, TokenizerConfig
from titan.data.encode import BadConversation, Encoded, Encoder
from titan.data.prepared import FORMAT, MANIFEST, Part, PartWriter, Prepared, open_prepared, read_part, write_manifest
from titan.data.shard import Document, Shard, portion_bytes
from titan.data.source import Source, open_source, source_files
from titan.data.tokenizer import Tokenizer, build_tokenizer
from titan.errors import DataError, TitanError
from titan.run_directory import remove_leftovers, unique_temporary, write_atomically

_ALONE_BYTES = 8 << 20
"""Less than this is done before other processes have started."""
_POLL_SECONDS = 0.1
_REPORT_SECONDS = 5.0
_WRITERS = ".writers"
"""In a folder that is being made: a file of each process that makes it, touched as long as that lives."""
_BEAT_SECONDS = 1.0


@dataclass(frozen=True)
class Progress:
    """How far the work is."""

    documents: int
    """Done by now, those of an earlier start included."""
    tokens: int
    tokens_per_second: float
    """Since this start."""
    seconds_left: float | None
    """None while too little is done to tell."""


def describe_progress(progress: Progress, component: str = "") -> str:
    """Return it as a line, with the name of a mixture's component before it."""
    left = "" if progress.seconds_left is None else f", {_duration(progress.seconds_left)} left"
    return (
        f"{component + ': ' if component else ''}{progress.documents:,} documents, {progress.tokens:,} tokens, "
        f"{progress.tokens_per_second:,.0f} tok/s{left}"
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


@dataclass(frozen=True)
class Preparation:
    """What it takes to tokenise, in this process and in others."""

    tokenizer: Tokenizer
    cache_dir: str
    """Where tokenised text is kept."""
    is_writer: bool = True
    """Whether this process makes what is missing; others wait."""
    timeout_seconds: float = 600
    """How long the others wait without a sign of life from the writer."""
    workers: int | None = None
    """Processes that tokenise, this one included; None is one for each core."""
    report: Callable[[str, Progress], None] | None = None
    """Is told now and then of which component how much is done."""


def source_identity(config: SourceConfig, tokenizer: str) -> str:
    """Return a hash of everything that the tokens depend on.

    Of files that is their names, sizes and times; of a dataset of the hub its name, subset, revision and split, so what
    changes there under the same revision is not noticed.

    Args:
        config: What is read.
        tokenizer: The tokenizer's fingerprint.

    Raises:
        DataError: If there is no file, or if one has vanished.
    """
    digest = hashlib.sha256()
    told = {"version": FORMAT, "tokenizer": tokenizer} | describe_source(config)
    told.pop("path", None)
    digest.update(json.dumps(told, sort_keys=True).encode())
    for file in source_files(config):
        try:
            status = file.stat()
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror or error}") from error
        digest.update(f"\n{file}\t{status.st_size}\t{status.st_mtime_ns}".encode())
    return digest.hexdigest()[:32]


def describe_source(config: SourceConfig) -> dict[str, Any]:
    """Return what is read, as keys of the config."""
    values = {field.name: getattr(config, field.name) for field in fields(SourceConfig)}
    return {name: value.name if isinstance(value, Enum) else value for name, value in values.items()}


def prepare_source(config: SourceConfig, folder: Path, preparation: Preparation, name: str = "") -> Prepared:
    """Return the tokenised documents of a source, made now as far as they are not there.

    Args:
        config: The documents.
        folder: Where they are kept.
        preparation: What with.
        name: What they are called in a mixture.

    Raises:
        DataError: If a document is bad (see `Shard`), if there is no text at all, if the folder holds something else or
            cannot be written, or if a process dies.
    """
    tokenizer = preparation.tokenizer
    identity = source_identity(config, tokenizer.fingerprint)
    if (folder / MANIFEST).exists():
        found = open_prepared(folder)
        if found.identity != identity:
            raise DataError(
                f"{folder} holds other data: {_told(found.source)}, with the tokenizer {found.tokenizer[:12]}\n"
                f"  This command asks for {_told(describe_source(config))}, with the tokenizer "
                f"{tokenizer.fingerprint[:12]}\n  Try  --to ANOTHER_FOLDER   or delete it"
            )
        return found
    with sign_of_life(folder):  # from here on, for a dataset may be fetched for hours before its first part is made
        source = open_source(config)
        with _writing(folder):
            _claim(folder, identity)
        parts = _make_parts(source, folder, preparation, name)
        prepared = Prepared(folder, tokenizer.fingerprint, tokenizer.n_tokens, describe_source(config), identity, parts)
        if not prepared.documents:
            raise DataError(_no_text(source, prepared.skipped))
        with _writing(folder):
            if not (folder / MANIFEST).exists():  # as it does where another machine was faster
                write_manifest(prepared)
    return prepared


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Say of an OSError that it was met while writing."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{folder} cannot be written: {error.strerror or error}\n"
            "  Try  data.cache_dir=/path/with/space   or  --to DIR"
        ) from error


def find_or_prepare(config: SourceConfig, preparation: Preparation, name: str = "") -> Prepared:
    """Return the tokenised documents of a source from the cache, made now where they are missing.

    Args:
        config: The documents.
        preparation: What with, and whether here.
        name: What they are called in a mixture.

    Raises:
        DataError: As `prepare_source`; or if the wait is in vain.
    """
    folder = cache_folder(config, preparation.cache_dir, preparation.tokenizer.fingerprint)
    if preparation.is_writer:
        return prepare_source(config, folder, preparation, name)
    wait_for((folder / MANIFEST).exists, folder, preparation.timeout_seconds)
    return open_prepared(folder)


def cache_folder(config: SourceConfig, cache_dir: str, tokenizer: str) -> Path:
    """Return where in the cache the documents of a source are, or will be."""
    return Path(cache_dir) / "prepared" / source_identity(config, tokenizer)


def plan_parts(shards: list[Shard]) -> list[list[Shard]]:
    """Take neighbouring shards together until they have some size."""
    parts: list[list[Shard]] = []
    size = enough = portion_bytes(sum(shard.size_bytes for shard in shards))
    for shard in shards:
        if size >= enough:
            parts.append([])
            size = 0
        parts[-1].append(shard)
        size += shard.size_bytes
    return parts


@contextlib.contextmanager
def sign_of_life(folder: Path) -> Iterator[None]:
    """Show those that wait for a folder that this process is at it, as long as the block runs.

    Raises:
        DataError: If the folder cannot be written.
    """
    with _writing(folder):
        mine = _register(folder / _WRITERS)
    is_over = threading.Event()

    def beat() -> None:
        while not is_over.wait(_BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(mine)

    thread = threading.Thread(target=beat, name="sign of life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        with contextlib.suppress(OSError):  # the folders are not empty if all went well, or if others are at it
            mine.unlink()
            mine.parent.rmdir()
            folder.rmdir()


def _register(writers: Path) -> Path:
    """Make a file of this process's own in a folder, which another may remove at any moment when it is empty."""
    mine = unique_temporary(writers / "writer")
    for attempt in range(10):
        try:
            writers.mkdir(parents=True, exist_ok=True)
            mine.touch()
            break
        except FileNotFoundError:
            if attempt == 9:
                raise
    remove_leftovers(writers, "writer")
    return mine


def wait_for(is_there: Callable[[], bool], folder: Path, timeout_seconds: float) -> None:
    """Wait for what another process writes, as long as it gives a sign of life: see `sign_of_life`.

    Raises:
        DataError: If it gives none for so many seconds.
    """

    def look() -> set[tuple[str, int]]:
        signs = set()
        for file in (folder / _WRITERS).glob("*"):
            with contextlib.suppress(FileNotFoundError):  # gone between listing and looking
                signs.add((file.name, file.stat().st_mtime_ns))
        return signs

    seen, since = look(), time.monotonic()
    while not is_there():
        time.sleep(_POLL_SECONDS)
        now = look()
        if now != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > timeout_seconds:
            raise DataError(
                f"waited {timeout_seconds:.0f} s for another rank to tokenise the data into {folder}, and it gave no "
                "sign of life\n  See what became of it; where machines share no disk, data.cache_dir has to be on one "
                "that each machine's ranks share"
            )


def _claim(folder: Path, identity: str) -> None:
    """Say whose the folder is before anything is in it, so that parts of other data are never taken for this data's."""
    note = folder / "identity"
    there = note.read_text().strip() if note.exists() else ""
    if there == identity:
        return
    if there or any(folder.glob("part_*")):
        raise DataError(
            f"{folder} holds a part of other data, whose preparation did not come to its end\n"
            "  Try  --to ANOTHER_FOLDER   or delete it"
        )
    write_atomically(note, identity + "\n")


def _make_parts(source: Source, folder: Path, preparation: Preparation, name: str) -> list[Part]:
    tokenizer, plan = preparation.tokenizer, plan_parts(source.shards)
    done: dict[int, Part] = {}
    for index, shards in enumerate(plan):
        part = read_part(folder, _part_name(index), [shard.name for shard in shards], tokenizer.n_tokens)
        if part is not None:
            done[index] = part
    remove_leftovers(folder, "part_*")
    todo = [index for index in range(len(plan)) if index not in done]
    left_bytes = sum(shard.size_bytes for index in todo for shard in plan[index])
    workers = min(preparation.workers or len(os.sched_getaffinity(0)), len(todo))
    report = None if preparation.report is None else partial(preparation.report, name)
    meter = _Meter(report, done.values(), left_bytes)
    encoder = Encoder(tokenizer, source.config)
    if workers <= 1 or left_bytes < _ALONE_BYTES:
        for index in _in_turn(todo, folder):
            done[index] = _make_part(folder, index, plan[index], encoder, meter.count)
            meter.finished(sum(shard.size_bytes for shard in plan[index]))
    else:
        for index, part in _in_processes(folder, plan, todo, encoder, workers, meter):
            done[index] = part
            meter.finished(sum(shard.size_bytes for shard in plan[index]))
    return [done[index] for index in range(len(plan))]


def _in_turn(todo: list[int], folder: Path) -> Iterator[int]:
    """Yield every part: in their order, or in any while another machine is at them too, so that they share the work."""
    left, choice = list(todo), random.SystemRandom()  # or machines that seed alike would choose alike
    while left:
        is_alone = len(list((folder / _WRITERS).glob("*"))) <= 1
        yield left.pop(0 if is_alone else choice.randrange(len(left)))


def _part_name(index: int) -> str:
    return f"part_{index:05d}"


def _make_part(
    folder: Path, index: int, shards: list[Shard], encoder: Encoder, count: Callable[[int, int], None]
) -> Part:
    """Tokenise some shards into one part, and say now and then by how many documents and tokens it has grown.

    It is not made again where another machine has made it meanwhile.

    Raises:
        DataError: If a document is bad, or something cannot be read or written.
    """
    has_learned = encoder.config.format is RecordFormat.chat
    name, names, n_tokens = _part_name(index), [shard.name for shard in shards], encoder.tokenizer.n_tokens
    if (there := read_part(folder, name, names, n_tokens)) is not None:
        count(there.documents, there.tokens)
        return there
    text_bytes, skipped = 0, Counter[str]()
    told = 0, 0
    with _writing(folder):
        writer = PartWriter(folder, name, names, n_tokens, has_learned)
        try:
            for number, shard in enumerate(shards):
                for document, encoded in _encode(shard, encoder):
                    if writer.add(encoded.tokens, encoded.learned, document.record, number):
                        count(writer.documents - told[0], writer.tokens - told[1])
                        told = writer.documents, writer.tokens
                text_bytes += shard.text_bytes
                skipped += shard.skipped
            part = writer.finish(text_bytes, skipped)
        except BaseException:
            writer.abandon()
            raise
    count(part.documents - told[0], part.tokens - told[1])
    return part


def _encode(shard: Shard, encoder: Encoder) -> Iterator[tuple[Document, Encoded]]:
    """Yield a shard's documents with their tokens.

    Raises:
        DataError: If one is bad, or if the shard cannot be read.
    """
    try:
        for document in shard.read():
            try:
                encoded = encoder.encode(document.content)
            except BadConversation as error:
                shard.refuse_document(document, str(error), error.reason)
                continue
            yield document, encoded
    except OSError as error:  # such as a file that was there when the shards were listed
        raise DataError(f"{error.filename or shard.name} cannot be read: {error.strerror or error}") from error


class _Meter:
    """Counts what is done, and says so every few seconds."""

    def __init__(self, report: Callable[[Progress], None] | None, done: Any, left_bytes: int) -> None:
        self._report, self._left, self._bytes = report, left_bytes, 0
        self._documents = sum(part.documents for part in done)
        self._before = self._tokens = sum(part.tokens for part in done)
        self._start = self._last = time.monotonic()

    def count(self, documents: int, tokens: int) -> None:
        self._documents += documents
        self._tokens += tokens
        now = time.monotonic()
        if self._report is None or now - self._last < _REPORT_SECONDS:
            return
        self._last = now
        seconds = now - self._start
        left = seconds * (self._left / self._bytes - 1) if self._bytes else None
        self._report(Progress(self._documents, self._tokens, (self._tokens - self._before) / seconds, left))

    def finished(self, size_bytes: int) -> None:
        self._bytes += size_bytes


def _in_processes(
    folder: Path,
    plan: list[list[Shard]],
    todo: list[int],
    encoder: Encoder,
    workers: int,
    meter: _Meter,
) -> Iterator[tuple[int, Part]]:
    """Yield parts as they are made, by this process too: the others take a moment to start."""
    context = multiprocessing.get_context("spawn")  # the process may have threads, which a fork would not take along
    counts = context.SimpleQueue()
    ready = encoder.tokenizer.config, encoder.config, counts, os.getpid()
    pool = ProcessPoolExecutor(workers - 1, context, _start_worker, ready)
    futures: dict[Future[Part], int] = {}
    waiting = _in_turn(todo, folder)

    def hand_out() -> None:
        while len(futures) < 2 * (workers - 1) and (index := next(waiting, None)) is not None:
            with _no_main_module():  # submitting starts a process
                futures[pool.submit(_work, folder, index, plan[index])] = index

    def count(documents: int, tokens: int) -> None:
        meter.count(documents, tokens)
        while not counts.empty():
            meter.count(*counts.get())

    def take() -> Iterator[tuple[int, Part]]:
        for future in [future for future in futures if future.done()]:
            yield futures.pop(future), future.result()

    try:
        hand_out()
        for index in waiting:
            yield index, _make_part(folder, index, plan[index], encoder, count)
            yield from take()
            hand_out()
        while futures:
            wait(futures, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            count(0, 0)
            yield from take()
    except (BrokenProcessPool, OSError) as error:
        what = "has died, perhaps for lack of memory"
        if isinstance(error, OSError):
            what = f"cannot be started: {error.strerror or error}"
        raise DataError(
            f"a process that tokenises {what}\n  Try  data.prepare_workers=1   and again: what is done is kept"
        ) from error
    finally:
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes if futures else ():  # after an error: the parts they are at are not wanted
            process.terminate()
        for process in processes:
            process.join()


@contextlib.contextmanager
def _no_main_module() -> Iterator[None]:
    """Let processes that are started here not run the program that was started: they need nothing of it.

    It takes seconds where that is a training run, and would tokenise anew where it is a script without a guard.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


_encoder: Encoder | TitanError | None = None
_counts: Any = None


def _start_worker(tokenizer_config: TokenizerConfig, config: SourceConfig, counts: Any, parent: int) -> None:
    """Begin a process that tokenises."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's; the process that started this one ends it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _make_ready(tokenizer_config, config, counts)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _make_ready(tokenizer_config: TokenizerConfig, config: SourceConfig, counts: Any) -> None:
    """Make what every part needs, once in a process; what is wrong with it is told by the first part."""
    global _encoder, _counts
    _counts = counts
    try:
        _encoder = Encoder(build_tokenizer(tokenizer_config), config)
    except TitanError as error:  # raised here, the pool would only say that it is broken
        _encoder = error


def _end_with(parent: int) -> None:
    """End this process when the one that started it has, however that ended."""
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os._exit(1)


def _work(folder: Path, index: int, shards: list[Shard]) -> Part:
    if isinstance(_encoder, TitanError):
        raise _encoder
    assert _encoder is not None, "made ready"
    return _make_part(folder, index, shards, _encoder, lambda *count: _counts.put(count))


def _no_text(source: Source, skipped: dict[str, int]) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
    if source.files:
        names = ", ".join(str(file) for file in source.files[:3])
        where = f"{len(source.files)} files ({names})"
    else:
        where = f"{source.config.dataset}/{source.config.split}"
    return f"no text in {where}{': ' + reasons if reasons else ''}"


def _told(source: dict[str, Any]) -> str:
    keys = ("kind", "path", "dataset", "subset", "revision", "split")
    return " ".join(
        f"data.{key}={source[key]}"
        for key in keys
        if source.get(key) is not None and (key != "split" or source.get("dataset"))
    )
