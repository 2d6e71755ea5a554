"""The command for what others made: `python -m titan.convert import | export | inspect | verify | diff | toml`.

import   Hugging Face folder, Meta folder or torch.save file -> titan checkpoint
export   titan checkpoint -> Hugging Face folder or torch.save file
inspect  what is in any of them
verify   a checkpoint's files against their checksums, or those of every checkpoint of a run
diff     two of any format, tensor by tensor
toml     a TorchTitan config -> the command line of titan that trains the same

Exit codes: 0 done; 1 different, damaged, or what was written does not agree with its source (and was removed); 2 the
command is wrong; 66 no usable weights; 73 the disk cannot be written. Nothing in a file is ever executed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from titan.command import exit_code
from titan.config.schema import ModelConfig
from titan.errors import CommandError

_FORMATS = ("float32", "bfloat16", "float16")
_M_MMAP_THRESHOLD = -3
"""From malloc.h."""
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    parsed = build_parser().parse_args(arguments)
    give_memory_back()
    sys.exit(exit_code(lambda: parsed.run(parsed)))


def give_memory_back() -> None:
    """Have the C library return the memory of every large tensor to the system as soon as it is freed.

    After the first one, glibc would take tensors of up to 32 MiB from its heap, where the hole that an aligned block
    leaves is too small for the next one of the same size: memory would grow to that of all tensors together.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def build_parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m titan.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_import(commands)
    _add_export(commands)
    command = _add(commands, "inspect", _inspect, "Say what is in weights of any format, without reading a tensor.")
    command.add_argument("path", type=Path, metavar="PATH", help="a checkpoint, a run (its newest), or another format")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command = _add(commands, "verify", _verify, "Hold the files of titan checkpoints against their checksums.")
    command.add_argument("paths", type=Path, metavar="PATH", nargs="+", help="a checkpoint, or a run with all of its")
    command = _add(commands, "diff", _diff, "Compare two sets of weights of any format. Exit code 1 if they differ.")
    command.add_argument("first", type=Path, metavar="A")
    command.add_argument("second", type=Path, metavar="B")
    command.add_argument(
        "--tolerance",
        type=_share,
        default=0.0,
        metavar="SHARE",
        help="differences that do not count, as a share of a tensor's largest number; formats then do not count either",
    )
    command = _add(
        commands, "toml", _toml, "Say a TorchTitan config (TOML, version 0.2.2) as a titan.train command line."
    )
    command.add_argument("file", type=Path, metavar="FILE", help="such as train_configs/llama3_8b.toml")
    command.add_argument(
        "--ranks",
        type=_count,
        metavar="N",
        help="GPUs that it is for (default: the smallest number that its degrees and its batch allow)",
    )
    return parser


def _add_import(commands: argparse._SubParsersAction) -> None:
    command = _add(commands, "import", _import, "Make a titan checkpoint of weights in another format.")
    command.add_argument("source", type=Path, metavar="SRC", help="a Hugging Face or Meta folder, or a torch.save file")
    command.add_argument("destination", type=Path, metavar="DST", help="the checkpoint's folder; must not be there yet")
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="model=OPTION|model.KEY=VALUE",
        help="the shape of the model in a torch.save file, which does not say; as for titan.train",
    )
    command.add_argument(
        "--rope-factor",
        type=float,
        metavar="FACTOR",
        help="of a Meta folder with use_scaled_rope, which does not say (default: 32 for Llama 3.2's widths, else 8)",
    )
    command.add_argument("--no-verify", action="store_true", help="do not compare what was written with its source")


def _add_export(commands: argparse._SubParsersAction) -> None:
    command = _add(commands, "export", _export, "Make a Hugging Face folder or a torch.save file of a checkpoint.")
    command.add_argument("source", type=Path, metavar="SRC", help="a titan checkpoint, or a run: its newest one")
    command.add_argument("destination", type=Path, metavar="DST", help="must not be there yet")
    command.add_argument("--to", required=True, choices=("hugging_face", "torch"), help="the format")
    command.add_argument("--dtype", choices=_FORMATS, help="round the weights to this format (default: keep theirs)")
    command.add_argument(
        "--max-shard-bytes",
        type=_bytes,
        metavar="SIZE",
        help="of hugging_face: the largest size of one file, such as 500MB or 2GiB (default: 5GB)",
    )
    command.add_argument(
        "--content",
        choices=("weights", "all"),
        help="of torch: all takes the optimizer's state along (default: weights)",
    )
    command.add_argument("--no-verify", action="store_true", help="do not compare what was written with its source")


# torch takes seconds to import, which --help and a mistyped command need not: so each command imports what it needs.


def _import(arguments: argparse.Namespace) -> int:
    from titan.convert.sources import META, TORCH, open_source
    from titan.convert.transfer import check_free, import_weights

    check_free(arguments.destination)
    source = open_source(arguments.source)
    if arguments.overrides:
        if source.kind != TORCH:
            raise CommandError(f"{' '.join(arguments.overrides)}: a {source.kind} says itself of which shape it is")
        source = replace(source, config=_compose_model(arguments.overrides))
    if arguments.rope_factor is not None:
        scaling = source.config.rope_scaling if source.config is not None else None
        if source.kind != META or source.config is None or scaling is None:
            raise CommandError("--rope-factor is for a Meta folder whose params.json has use_scaled_rope")
        config = replace(source.config, rope_scaling=replace(scaling, factor=arguments.rope_factor))
        source = replace(source, config=config, notes=[])
    import_weights(source, arguments.destination, not arguments.no_verify, _say)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    import torch

    from titan.convert.sources import open_source
    from titan.convert.transfer import check_free, export_hugging_face, export_torch

    if arguments.to == "torch" and arguments.max_shard_bytes is not None:
        raise CommandError("--max-shard-bytes is for --to hugging_face: torch.save makes one file")
    if arguments.to == "hugging_face" and arguments.content == "all":
        raise CommandError("--content all is for --to torch: a Hugging Face folder has no optimizer's state")
    check_free(arguments.destination)
    source = open_source(arguments.source)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    is_verified = not arguments.no_verify
    if arguments.to == "torch":
        export_torch(source, arguments.destination, dtype, arguments.content or "weights", is_verified, _say)
    else:
        shard_bytes = arguments.max_shard_bytes or 5 * 10**9
        export_hugging_face(source, arguments.destination, dtype, shard_bytes, is_verified, _say)
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from titan.convert.describe import describe, format_description
    from titan.convert.sources import open_source

    found = describe(open_source(arguments.path))
    print(json.dumps(found, indent=2) if arguments.json else "\n".join(format_description(found)))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from titan.convert.wholeness import check_whole, find_checkpoints

    folders = [folder for path in arguments.paths for folder in find_checkpoints(path)]
    is_whole = True
    for folder in folders:
        verdict = check_whole(folder)
        is_whole = is_whole and not verdict.damage
        for line in verdict.lines():
            _say(line)
    return 0 if is_whole else 1


def _diff(arguments: argparse.Namespace) -> int:
    from titan.convert.difference import find_differences, format_differences
    from titan.convert.sources import open_source

    found = find_differences(open_source(arguments.first), open_source(arguments.second), arguments.tolerance)
    for line in format_differences(found):
        _say(line)
    return 0 if found.is_same else 1


def _toml(arguments: argparse.Namespace) -> int:
    from titan.convert.toml import translate

    translation = translate(arguments.file, arguments.ranks)
    for line in translation.lines():
        _say(line)
    if translation.refusal is not None:
        raise translation.refusal
    return 0


def _compose_model(overrides: list[str]) -> ModelConfig:
    from titan.config.load import compose

    foreign = [text for text in overrides if not re.match(r"model[.=]", text)]
    if foreign:
        raise CommandError(f"{foreign[0]}: only the model's shape is asked for here\n  Try  model=llama3_8b")
    return compose(overrides).model


def _add(
    commands: argparse._SubParsersAction, name: str, run: Callable[[argparse.Namespace], int], description: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=description, description=description)
    command.set_defaults(run=run)
    return command


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)\s*([KMG]I?B)?", text.strip().upper())
    if not match or not int(match.group(1)):
        raise argparse.ArgumentTypeError(f"{text} is no size such as 500MB or 2GiB")
    return int(match.group(1)) * _UNITS[match.group(2) or ""]


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of GPUs")
    return int(text)


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no share such as 1e-5")
    return share


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
