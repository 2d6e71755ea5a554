"""The command: `python -m titan.plan [group=option] [group.key=value] [--device NAME] [--calibrate RUN]`.

Checks what is composed, as titan.train would, and says without a GPU and without starting anything what the fullest
rank holds, how long a step takes and what travels, with all that is assumed; then which layouts of the same training
would be fastest on the same cluster, as overrides to paste, and why others cannot be.

--calibrate <run.dir> first fits what the device reaches to a run that you have trained, and says how far off that is;
--store FILE keeps it, --calibration FILE takes it again. `python -m titan.plan published` prints the plans of the runs
that TorchTitan has published beside what those measured.

Exit codes: 0 it fits; 1 it does not; 2 the command or the config is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

from titan.command import exit_code
from titan.config.load import compose
from titan.config.schema import TitanConfig
from titan.errors import CommandError, Problem
from titan.plan import calibration as calibrations
from titan.plan.assumptions import Assumptions
from titan.plan.devices import DEVICES, Accelerator
from titan.plan.planner import Plan, build_plan, resolve
from titan.plan.report import describe, describe_layout
from titan.plan.search import Search, least_devices, overrides_of, search

_BANDWIDTHS = {
    "memory_bandwidth": "its own memory",
    "node_bandwidth": "the other devices of its node",
    "network_bandwidth": "other nodes, its share",
    "host_bandwidth": "the CPU's memory",
}


def main() -> int:
    """Run the command line; returns the exit code."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["published"]:
        return exit_code(lambda: _published(arguments[1:]))
    given = build_parser().parse_intermixed_args(arguments)
    return exit_code(lambda: 0 if _plan(given) else 1)


def build_parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    command = argparse.ArgumentParser(
        prog="python -m titan.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("overrides", nargs="*", metavar="group=option|key=value", help="as for titan.train")
    command.add_argument("--device", metavar="NAME", help=f"what to plan for: {', '.join(DEVICES)}")
    command.add_argument("--peak-tflops", type=_positive, metavar="N", help="dense bfloat16 peak of a device")
    command.add_argument("--memory-gib", type=_positive, metavar="N", help="memory of a device")
    for name, where in _BANDWIDTHS.items():
        flag = f"--{name.replace('_', '-')}"
        command.add_argument(flag, type=_positive, metavar="N", help=f"GB/s in one direction to {where}")
    command.add_argument(
        "--assume", action="append", default=[], metavar="NAME=N", help="another value of an assumption on the screen"
    )
    command.add_argument("--calibrate", metavar="RUN", help="a run.dir to fit the measured assumptions to")
    command.add_argument("--store", metavar="FILE", help="with --calibrate: keep what was fitted")
    command.add_argument("--calibration", metavar="FILE", help="take what --store has kept")
    command.add_argument("--best", type=_count, default=10, metavar="N", help="layouts to show (default: 10); 0: none")
    command.add_argument("--config-dir", metavar="DIR", help="a folder of config groups of your own")
    return command


def _plan(given: argparse.Namespace) -> bool:
    if given.calibrate and given.calibration:
        raise _wrong("--calibrate and --calibration both say what the device reaches", "one of the two")
    if given.store and not given.calibrate:
        raise _wrong("--store FILE has nothing to keep", "--calibrate <run.dir> --store FILE")
    composed = compose(given.overrides, given.config_dir)
    config, device, notes = resolve(composed, given.device)
    device = _changed(device, given)
    assumptions, device = _assumptions(given, config, device)
    plan = build_plan(config, device, assumptions, notes=notes)
    for line in describe(plan):
        print(line)
    if given.best and plan.timing is not None:
        print()
        for line in _describe_search(search(config, device, assumptions, given.best), plan):
            print(line)
    return plan.fits


def _assumptions(
    given: argparse.Namespace, config: TitanConfig, device: Accelerator
) -> tuple[Assumptions, Accelerator]:
    """Return what the device reaches, and the device; one whose peak is not known has its rate for one then."""
    assumptions = _assumed(given.assume)
    if not (given.calibrate or given.calibration):
        return assumptions, device
    if given.calibrate:
        measured = calibrations.read_run(Path(given.calibrate), config.model)
        found = calibrations.calibrate(measured, device, assumptions)
        before = build_plan(measured.config, calibrations.with_peak(device), assumptions)
        after = build_plan(measured.config, calibrations.with_peak(device), found.apply(assumptions))
        for line in calibrations.describe(found, measured, before, after):
            print(line)
        print()
        if given.store:
            calibrations.store(found, Path(given.store))
    else:
        found = calibrations.load(Path(given.calibration))
        if found.device != device.name:
            raise _wrong(
                f"--calibration {given.calibration} is of {found.device}, and --device is {device.name}",
                f"--device {found.device}",
            )
    return found.apply(assumptions), calibrations.with_peak(device)


def _assumed(words: list[str]) -> Assumptions:
    known = [field.name for field in fields(Assumptions)]
    values = {}
    for word in words:
        name, _, text = word.partition("=")
        try:
            number = float(text)
        except ValueError:
            number = -1.0
        if name not in known or number < 0:
            raise _wrong(f"--assume {word} is no assumption and a number", f"--assume {known[0]}=0.5", ", ".join(known))
        values[name] = number
    return replace(Assumptions(), **values)


def _changed(device: Accelerator, given: argparse.Namespace) -> Accelerator:
    names = ("peak_tflops", "memory_gib", *_BANDWIDTHS)
    values = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    return replace(device, **values, note=f"{device.note}; {', '.join(values)} as given") if values else device


def _describe_search(found: Search, plan: Plan) -> Iterator[str]:
    devices = plan.devices
    yield (
        f"layouts    of the same {plan.tokens_per_step:,} tokens a step on {devices} devices: {found.tried:,} tried, "
        f"{found.fitting:,} fit"
    )
    for place, each in enumerate(found.best, 1):
        assert each.timing is not None, "the peak is known, or 1"
        mfu = "" if each.mfu is None else f"mfu {each.mfu:.1%}, "
        yield (
            f"{place:>3}. {each.tokens_per_second_per_device:,.0f} tokens/s a device, {mfu}"
            f"{each.timing.step:.3g} s a step, {each.memory_gib:.1f} GiB, {describe_layout(each)}"
        )
        yield f"     {' '.join(overrides_of(each.config, plan.config))}"
    if not found.best:
        least = least_devices(plan)
        yield (
            f"  none fits. The least number of devices on which one does: {least:,}, of this one times powers of two"
            if least
            else "  none fits, on however many devices: a microbatch of one row is too much for one"
        )
    if found.failures:
        yield "cannot be, the simplest first"
        for failure in found.failures:
            yield f"     {failure.layout}: {failure.why}"
    if not plan.config.compile.enable and plan.device.has_float8:
        yield "  float8 is not tried without compile=inductor, whose casts would be operations of their own"


def _published(rest: list[str]) -> int:
    from titan.plan import published

    if rest:
        raise _wrong("published takes no arguments", "python -m titan.plan published")
    for line in published.report():
        print(line)
    return 0


def _wrong(what: str, suggestion: str, why: str = "") -> CommandError:
    return CommandError(str(Problem(what, why, suggestion)))


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text} is not a number of layouts")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
