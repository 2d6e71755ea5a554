"""How every command of titan ends: a user's mistake is one message and an exit code, never a traceback."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

from titan.errors import INTERRUPTED, TitanError
from titan.log import silence


def exit_code(run: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Run what a command does; returns its own exit code, or that of what ended it.

    Args:
        run: Does it; None stands for 0.
        interrupted: What Ctrl-C leaves behind, in words.
    """
    try:
        code = run() or 0
        sys.stdout.flush()  # or a reader that has gone away would be met after the last word here
    except TitanError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `| head`
        silence(sys.stdout)
        return 128 + signal.SIGPIPE
    return code
