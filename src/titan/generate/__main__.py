"""The command for text: `python -m titan.generate checkpoint=PATH prompt='Once upon a time' [key=value]`.

PATH is a run directory (its newest whole checkpoint is taken), a checkpoint of one, or a Hugging Face folder. One
prompt is continued as you watch; several, prompt='[first,second]' or prompts_file=FILE, are continued together and
shown in their order. The text goes to standard output, everything else to standard error.

Exit codes: 0 done; 2 the command is wrong; 66 no usable weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from titan.command import exit_code
from titan.generate.options import describe_options, read_options, read_prompts

RANK = "rank"
"""The word with which this command starts the processes of tp=N."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == [RANK]:
        from titan.generate.ranks import rank_main

        rank_main(words[1:])
    parsed = build_parser().parse_intermixed_args(words)
    sys.exit(exit_code(lambda: _generate(parsed)))


def _generate(parsed: argparse.Namespace) -> None:
    options = read_options(parsed.overrides)
    prompts = read_prompts(options)
    from titan.generate.run import run  # torch takes seconds, which a mistyped command need not

    run(options, prompts, parsed.json)


def build_parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m titan.generate",
        description=__doc__,
        epilog="\n".join(["keys:", *(f"  {line}" for line in describe_options())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="see below")
    parser.add_argument("--json", action="store_true", help="print one JSON object a prompt, one a line")
    return parser


if __name__ == "__main__":
    main()
