"""titan's command, with the clock read between the parts of its start; `startup.py` runs it.

    python startup_clock.py FILE [group=option] [group.key=value]

Reads the clock where titan's own functions return, so the order of the parts is titan's and is not repeated here.
Only `import torch` and the import of the trainer are done a moment before the rank would do them itself, so that each
gets a time of its own. FILE takes a JSON list of [part, Unix time in seconds at its end].
"""

import time

MARKS = [("Python", time.time())]  # before any other import: the interpreter is up

import json  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402


def main() -> None:
    """Run the command in sys.argv."""
    marks_file = Path(sys.argv.pop(1))

    import titan.train
    import titan.worker

    mark("import of the front end")
    titan.train.freeze = and_mark(titan.train.freeze, "compose, check, freeze")
    train = titan.worker.train

    def train_with_marks(*arguments: Any) -> float | None:
        mark("rank: log, status, events")
        import torch.distributed as dist

        mark("import torch")
        from titan.trainer import build, device, loop

        mark("import of the trainer")
        device.select_device = and_mark(device.select_device, "device")
        build.load_data = and_mark(build.load_data, "data")
        dist.init_process_group = and_mark(dist.init_process_group, "process group")
        build.build_trainer = and_mark(build.build_trainer, "model and optimizer")
        loop.train_step = and_mark(loop.train_step, "first step")
        return train(*arguments)

    titan.worker.train = train_with_marks
    try:
        titan.train.main()
    finally:
        marks_file.write_text(json.dumps(MARKS))


def mark(part: str) -> None:
    """Note that a part ends now."""
    MARKS.append((part, time.time()))


def and_mark(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    """Return the function with a mark at its end."""

    def marked(*arguments: Any, **named: Any) -> Any:
        result = function(*arguments, **named)
        mark(part)
        return result

    return marked


if __name__ == "__main__":
    main()
