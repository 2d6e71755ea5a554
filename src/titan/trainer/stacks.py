"""Which rank hangs, and where: read from the Python stacks of all ranks at one moment.

A hang is one rank that does something else while all others wait for it. So the rank to blame is the one whose main
thread is *not* waiting for other ranks: it sleeps, reads, computes. One that has left no stack at all is stopped, or
its machine is gone. Where all wait, they wait for different things, and the fewest are the suspects.

The texts are those of `faulthandler`, which shows Python frames only: a wait inside native code has to be told by the
line that called it.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

_THREAD = re.compile(r"^(?:Current thread|Thread) 0x[0-9a-f]+.*\(most recent call first\):$")
_FRAME = re.compile(r'^  File "(?P<path>.*)", line (?P<line>\d+) in (?P<function>.*)$')
_TORCH = re.compile(r"-packages/torch/")
_TORCH_WAITS = re.compile(r"-packages/torch/distributed/(?!checkpoint/)")
_STANDARD_LIBRARY = re.compile(r"^<|/lib/python3[^/]*/(?!site-packages/|dist-packages/)")
_COMPILED = "torchinductor"
_WAITING_LINE = re.compile(r"\.(?:wait|wait_tensor|synchronize|barrier|tolist|item|cpu)\(|wait_tensor|store\.get\(")
"""Calls that end when another rank, or the device that works for all, is done."""
_SHOWN = 8


@dataclass(frozen=True)
class Frame:
    """One line of a stack."""

    path: str
    line: int
    function: str

    @property
    def short(self) -> str:
        """As a person would say it."""
        path = self.path
        for folder in ("/site-packages/", "/dist-packages/"):
            path = path.rpartition(folder)[2]
        path = "titan/" + path.rpartition("/titan/")[2] if "/titan/" in path else path
        return f"{path}:{self.line} in {self.function}"


@dataclass(frozen=True)
class Place:
    """Where a rank stands."""

    text: str
    is_waiting: bool
    """Whether it waits for other ranks, or for a device, there."""


@dataclass(frozen=True)
class Verdict:
    """Who hangs."""

    ranks: list[int]
    """Those to blame, ascending."""
    text: str
    """Who, where, and what the others do."""


def judge(stacks: Mapping[int, str]) -> Verdict:
    """Find the ranks to blame.

    Args:
        stacks: What each rank's `faulthandler` has written; empty for one that has written nothing.
    """
    places = {rank: find_place(frames) for rank, text in stacks.items() if (frames := main_thread(text))}
    silent = sorted(set(stacks) - set(places))
    busy = sorted(rank for rank, place in places.items() if not place.is_waiting)
    waiting = [rank for rank in sorted(places) if rank not in busy]
    says = [_say(silent, "does not answer (stopped, or the machine is gone)")] if silent else []
    says += [_say(group, f"hangs at {where}") for where, group in _by_place(busy, places)]
    blamed = sorted(silent + busy)
    others = [_say(group, f"waits at {where}") for where, group in _by_place(waiting, places)]
    if blamed:
        says += others[-1:]
    else:
        fewest = min(len(group) for _, group in _by_place(waiting, places))
        blamed = sorted(rank for _, group in _by_place(waiting, places) if len(group) == fewest for rank in group)
        says = ["all wait for each other", *others]
    return Verdict(blamed, "; ".join(says))


def main_thread(text: str) -> list[Frame]:
    """Return the frames of the main thread, innermost first; none where there is no stack."""
    threads: list[list[Frame]] = []
    for line in text.splitlines():
        if _THREAD.match(line):
            threads.append([])
        elif threads and (found := _FRAME.match(line)):
            threads[-1].append(Frame(found["path"], int(found["line"]), found["function"]))
    threads = [frames for frames in threads if frames]
    # the last in the list, as long as it has not been cut off
    own = [frames for frames in threads if any(frame.path.endswith("titan/worker.py") for frame in frames)]
    return next(iter(own[-1:] or threads[-1:]), [])


def find_place(frames: Sequence[Frame]) -> Place:
    """Return the innermost place that says something: in titan's code or a user's, not in a library they call."""
    is_waiting, reads = False, False
    for frame in frames:
        if _TORCH.search(frame.path):
            is_waiting |= bool(_TORCH_WAITS.search(frame.path)) or frame.function == "_engine_run_backward"
            continue
        if "/titan/data/" in frame.path and (reads or frame.path.endswith("/workers.py")):
            reads = True  # from the processes that read ahead
            continue
        if _STANDARD_LIBRARY.search(frame.path):
            continue
        is_waiting |= bool(_WAITING_LINE.search(linecache.getline(frame.path, frame.line)))
        if _COMPILED in frame.path or frame.function.startswith("<"):  # <listcomp>: a part of the next one
            continue
        return Place(f"{frame.short} (waiting for its data)", False) if reads else Place(frame.short, is_waiting)
    return Place(frames[0].short, is_waiting)


def name_ranks(ranks: Sequence[int]) -> str:
    """Return ranks in words: rank 3; ranks 3 and 5; of many, the first."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = [str(rank) for rank in ranks[:_SHOWN]]
    shown += [f"{len(ranks) - _SHOWN} more"] * (len(ranks) > _SHOWN)
    return f"ranks {', '.join(shown[:-1])} and {shown[-1]}"


def _say(ranks: Sequence[int], what: str) -> str:
    """Return what ranks do as a clause; `what` begins with a verb of one."""
    verb, _, rest = what.partition(" ")
    verb = verb if len(ranks) == 1 else {"does": "do"}.get(verb, verb[:-1])
    return f"{name_ranks(ranks)} {verb} {rest}"


def _by_place(ranks: Iterable[int], places: Mapping[int, Place]) -> list[tuple[str, list[int]]]:
    """Group ranks by where they stand, the fewest first."""
    groups: dict[str, list[int]] = {}
    for rank in ranks:
        groups.setdefault(places[rank].text, []).append(rank)
    return sorted(groups.items(), key=lambda group: len(group[1]))
