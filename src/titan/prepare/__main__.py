"""The command for data: `python -m titan.prepare [group=option] [key=value] | verify DIR | show DIR | replay RUN`.

Without a word before the overrides it tokenises what data=... names with tokenizer=..., in parallel, and writes that
where a run with the same overrides finds it, or into a folder of its own with --to, which data=prepared data.path=DIR
then trains on. What was done when it was interrupted is not done again.

verify   reads every byte of a prepared folder and holds it against its checksums
show     says what is in a prepared folder
replay   says which documents made up a step of a run, with their text

Exit codes: 0 done; 1 damaged, or another digest than the run has written down; 2 the command or the config is wrong;
65 a document or a folder is bad. `--help` behind any shows its options.
"""

from __future__ import annotations

import sys

from titan.command import exit_code
from titan.prepare import make, replay, show

COMMANDS = {"verify": show.verify_main, "show": show.main, "replay": replay.main}


def main() -> int:
    """Run the command line; returns the exit code."""
    arguments = sys.argv[1:]
    if arguments[:1] in (["-h"], ["--help"]):
        print((__doc__ or "").rstrip())
        print(f"\n{make.build_parser().format_help()}".rstrip())
        return 0
    command = COMMANDS.get((arguments[:1] or [""])[0])
    return exit_code(
        lambda: 0 if (make.main(arguments) if command is None else command(arguments[1:])) else 1,
        "interrupted; what is done is kept, and the same command goes on",
    )


if __name__ == "__main__":
    sys.exit(main())
