"""The command that proves: `python -m titan.verify parity|resume [group=option] [group.key=value]`.

parity   Trains the composed layout for some steps on CPU processes, and one process on the same rows, and holds the
         two against each other: the loss and the gradient norm of every step, every parameter's gradient, every
         parameter afterwards.
resume   Trains the composed layout twice: once undisturbed; once stopped in the middle, saved, and taken up again by
         new processes, on another layout if one is given with --onto. Holds the two against each other: the rows of
         every step, every loss and gradient norm, every bit of weights and optimizer. Writes what it finds to a file.

Exit code 0 if they are the same (bit for bit, or within the stated tolerance where the layout differs), 1 if not, 2 if
the command is wrong. `--help` behind either shows its options.
"""

from __future__ import annotations

import sys

from titan.command import exit_code
from titan.errors import ConfigError
from titan.verify import parity, resume

COMMANDS = {"parity": parity.main, "resume": resume.main}
RANKS = {"record": parity.rank_main, "train": resume.rank_main}
"""What the ranks that these commands start run."""


def main() -> int:
    """Run the command line; returns the exit code."""
    name, arguments = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if name in RANKS:
        RANKS[name](arguments)
    if name not in COMMANDS:
        wants_help = name in ("-h", "--help")
        print((__doc__ or "").rstrip() if wants_help else "usage: python -m titan.verify parity|resume [--help]")
        return 0 if wants_help else ConfigError.exit_code
    return exit_code(lambda: 0 if COMMANDS[name](arguments) else 1)


if __name__ == "__main__":
    sys.exit(main())
