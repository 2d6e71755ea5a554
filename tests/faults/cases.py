"""The faults that end a run, each with the moments at which it can strike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

CRASH = (1,)
STOPPED = (75,)
LOOKS = 3
"""How often a validation looks whether the run is to stop, of `VALIDATION`."""


@dataclass(frozen=True)
class Moment:
    """Where a run stands when a fault is drawn for it."""

    draw: Random
    step: int
    """The one that it goes on from."""
    interval: int
    shard_bytes: int

    @property
    def soon(self) -> int:
        """A step in which no save is, within three intervals."""
        steps = range(self.step + self.interval, self.step + 3 * self.interval)
        return self.draw.choice([step for step in steps if step % self.interval])

    @property
    def save(self) -> int:
        """The second or third save from here."""
        return self.draw.choice((2, 3))

    @property
    def byte(self) -> int:
        """A byte of the second or third save."""
        return (self.save - 1) * self.shard_bytes + self.draw.randrange(self.shard_bytes)

    @property
    def rows(self) -> int:
        """A look in the second or third validation, whichever that is of its own."""
        return (self.save - 1) * LOOKS + self.draw.randrange(1, LOOKS + 1)

    @property
    def rank(self) -> int:
        """One of two ranks."""
        return self.draw.randrange(2)


@dataclass(frozen=True)
class Case:
    """A fault, and how the command has to end."""

    name: str
    plant: Callable[[Moment], str]
    codes: tuple[int, ...] = CRASH


def _ranks(name: str, plant: str, slow: float = 0.0) -> list[Case]:
    """Return a case for each of two ranks; `plant` has {rank} and what a moment has."""
    return [Case(name.format(rank=rank), _filled(plant, rank, slow)) for rank in range(2)]


def _filled(plant: str, rank: int | None = None, slow: float = 0.0) -> Callable[[Moment], str]:
    """Return what makes a fault of a moment; with `slow`, each of the rank's writes takes so many seconds longer."""

    def fill(moment: Moment) -> str:
        values = {"rank": moment.rank if rank is None else rank, "save": moment.save, "byte": moment.byte}
        values["rows"] = moment.rows
        text = plant.format(**values, next=moment.step + 1, soon=moment.soon, sync=2 * moment.save)
        return text + f";slow:{values['rank']}:write:{slow}" * bool(slow)

    return fill


STEP = [
    *_ranks("SIGKILL of rank {rank} in a step", "kill:{rank}:step:{soon}"),
    Case("SIGKILL of a rank, its weights moved", _filled("kill:{rank}:moved:{soon}")),
    Case("SIGKILL of the launcher", _filled("kill_launcher:{rank}:step:{soon}"), (-9,)),
]
SAVE = [
    Case("SIGKILL of a rank as a save begins, sync", _filled("kill:{rank}:save:{save}")),
    *_ranks("SIGKILL of rank {rank} at a byte of its shard, sync", "kill:{rank}:byte:{byte}"),
    Case("SIGKILL between manifest and rename, sync", _filled("kill:0:manifest:{save}")),
    Case("SIGKILL between rename and the sync of the folder, sync", _filled("kill:0:sync:{sync}")),
    Case("SIGKILL between commit and removal of old ones, sync", _filled("kill:0:committed:{save}")),
    Case("SIGKILL in the removal of old ones, sync", _filled("kill:0:removing:1")),
]
LOAD = [
    Case("SIGKILL of a rank while it loads", _filled("kill:{rank}:load:1")),
    Case("SIGKILL of a rank that has just loaded", _filled("kill:{rank}:loaded:1")),
]
"""Only where there is something to load."""
BACKGROUND = {
    "async": [
        *_ranks("SIGKILL of rank {rank} in a step while a save goes on, async", "kill:{rank}:step:{soon}", slow=0.0005),
        *_ranks("SIGKILL of rank {rank} at a byte of its shard, async", "kill:{rank}:byte:{byte}"),
        Case("SIGKILL between manifest and rename, async", _filled("kill:0:manifest:{save}")),
        Case("SIGKILL between commit and removal of old ones, async", _filled("kill:0:committed:{save}")),
    ],
    "async_pinned": [
        *_ranks("SIGKILL of rank {rank} while it copies its state, async_pinned", "kill:{rank}:copy:{save}"),
        *_ranks("SIGKILL of rank {rank} at a byte of its shard, async_pinned", "kill:{rank}:byte:{byte}"),
        Case("SIGKILL between commit and removal of old ones, async_pinned", _filled("kill:0:committed:{save}")),
    ],
}
VALIDATION = [
    Case("SIGKILL of a rank as a validation begins", _filled("kill:{rank}:validation:{save}")),
    *_ranks("SIGKILL of rank {rank} in the midst of a validation", "kill:{rank}:validated_rows:{rows}"),
    Case("SIGTERM to the launcher in a validation", _filled("term_launcher:{rank}:validated_rows:{rows}"), STOPPED),
    Case("SIGUSR2 to one rank in a validation", _filled("usr2:{rank}:validated_rows:{rows}"), STOPPED),
]
"""Of a run that validates where it saves, looking some times whether to stop."""
STOP = [
    Case("SIGTERM to the launcher in a step", _filled("term_launcher:{rank}:step:{soon}"), STOPPED),
    Case("SIGUSR2 to the launcher in a step", _filled("usr2_launcher:{rank}:step:{soon}"), STOPPED),
    Case("SIGINT to the launcher in a step", _filled("int_launcher:{rank}:step:{soon}"), STOPPED),
    Case("SIGTERM to the launcher in a save", _filled("term_launcher:{rank}:byte:{byte}"), STOPPED),
    Case("SIGUSR2 to one rank in a step", _filled("usr2:{rank}:step:{soon}"), STOPPED),
    Case("SIGUSR2 to one rank in a save", _filled("usr2:{rank}:byte:{byte}"), STOPPED),
    Case(
        "SIGTERM to the launcher, and another in the save that follows",
        _filled("term_launcher:0:step:{next};term_launcher:1:save:1"),
        STOPPED,
    ),
    Case("SIGTERM to one rank alone", _filled("term:{rank}:step:{soon}"), CRASH),
]
