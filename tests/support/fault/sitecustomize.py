"""Faults in a rank: put this folder on PYTHONPATH and say in PLANTED_FAULT what happens, in which rank, where and when.

    kill:1:7                                rank 1 is killed in the 7th step that it does
    nan:1:step:7                            its loss is no number in step 7 of the run
    term_launcher:0:save:2                  what has started rank 0 gets SIGTERM as its 2nd save begins
    kill:0:byte:1234;slow:1:write:0.05      at the 1234th byte that it writes to checkpoints; and rank 1's disk is slow
    late:0:built:3;late:1:built:1           what a step gave is looked at late, as on a GPU: see `_late`

Python imports a module of this name before it runs anything, so the code under test stays as it is: a fault is
planted when, and only where, the module that has its place is imported.
"""

import ctypes
import functools
import importlib.util
import multiprocessing
import os
import signal
import sys
import time
from collections import namedtuple

_BEFORE = {
    "call": ("titan.trainer.loop", "run_step"),
    "step": ("titan.trainer.loop", "run_step"),
    "save": ("titan.checkpoint.store", "CheckpointStore._write"),
    "copy": ("titan.checkpoint.staging", "Copies.copy"),
    "write": ("titan.checkpoint.files", "_ChecksummingStream.write"),
    "byte": ("titan.checkpoint.files", "_ChecksummingStream.write"),
    "sync": ("titan.checkpoint.manifest", "sync_folder"),
    "removing": ("titan.checkpoint.manifest", "shutil.rmtree"),
    "load": ("titan.checkpoint.store", "CheckpointStore.load"),
    "built": ("titan.trainer.build", "build_trainer"),
    "ledger": ("titan.run_directory", "RunDirectory.append_ledger"),
    "row": ("titan.data.rows", "PreparedRows.read"),
    "validation": ("titan.trainer.validation", "validate"),
    "validated_rows": ("titan.trainer.loop", "end_if_told"),
}
_AFTER = {
    "moved": ("titan.trainer.loop", "run_step"),
    "manifest": ("titan.checkpoint.manifest", "Manifest.write"),
    "committed": ("titan.checkpoint.store", "commit"),
    "loaded": ("titan.checkpoint.store", "CheckpointStore.load"),
}
_SIGNALS = {name: getattr(signal, f"SIG{name.upper()}") for name in ("kill", "stop", "int", "term", "usr1", "usr2")}

Fault = namedtuple("Fault", "action rank place number")


def _parse(text):
    """Return a fault; one of three parts is in a step of the rank's own counting."""
    action, rank, *place, number = text.split(":")
    return Fault(action, rank, *(place or ["call"]), number)


class _Plant:
    """Wraps the places of faults as soon as the modules that have them are loaded."""

    def __init__(self, faults):
        self.faults = faults
        self.modules = {(_BEFORE | _AFTER)[fault.place][0] for fault in faults}

    def find_spec(self, name, path=None, target=None):
        if name not in self.modules:
            return None
        self.modules.remove(name)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_wrap(module):
            load(module)
            for fault in self.faults:
                where, function = (_BEFORE | _AFTER)[fault.place]
                if where == name:
                    *owners, attribute = function.split(".")
                    owner = functools.reduce(getattr, owners, module)
                    setattr(owner, attribute, _wrap(getattr(owner, attribute), fault))

        spec.loader.exec_module = load_and_wrap
        return spec


def _wrap(function, fault):
    is_here = os.environ.get("RANK", "0") == fault.rank
    if fault.action == "environment":  # how long the values of some variables are: of a secret, more would be told
        print(*(f"{name} {len(os.environ.get(name, ''))}" for name in fault.rank.split(",")), flush=True)
        return function
    if fault.action == "slow":

        def slow(*given, **named):
            if is_here or fault.place == "call":  # every step of every rank
                time.sleep(float(fault.number))
            return function(*given, **named)

        return slow
    if not is_here:
        return function
    if fault.place == "byte":
        return _at_byte(function, fault)
    if fault.action == "late":
        return _late(function, int(fault.number))
    count = 0

    def faulty(*given, **named):
        nonlocal count
        if fault.place == "removing" and ".step_" not in str(given[0]):  # everybody's function
            return function(*given, **named)
        count += 1
        now = given[0].state.step + 1 if fault.place in ("step", "moved") else count
        if now != int(fault.number) or (fault.place == "row" and multiprocessing.parent_process() is None):
            return function(*given, **named)
        if fault.action in ("nan", "scale"):
            return _WRONG[fault.action](function, *given)
        result = function(*given, **named) if fault.place in _AFTER else None
        _strike(fault.action)
        return result if fault.place in _AFTER else function(*given, **named)

    return faulty


def _at_byte(write, fault):
    """Let so many bytes through, of all that the rank writes to checkpoints, and no more."""
    written = 0

    def faulty(stream, data):
        nonlocal written
        rest = memoryview(data).cast("B")
        before, written = written, written + len(rest)
        if not before <= int(fault.number) < written:
            return write(stream, data)
        whole = len(rest)
        write(stream, rest[: int(fault.number) - before])
        _strike(fault.action)
        write(stream, rest[int(fault.number) - before :])
        return whole

    return faulty


def _late(build_trainer, questions):
    """Have steps looked at late, for all ranks or none: each is here when this rank was asked for it so often."""

    def faulty(*given, **named):
        from titan.trainer.step import PendingResult

        def is_here(result):
            result.questions = getattr(result, "questions", 0) + 1
            return result.questions >= questions

        PendingResult.is_here = is_here
        trainer = build_trainer(*given, **named)
        trainer.defers = True
        return trainer

    return faulty


def _strike(action):
    name, _, whom = action.partition("_")
    if action == "error":
        raise RuntimeError("a planted error")
    if action == "sleep":
        time.sleep(600)
    elif action == "lock":  # hangs in native code that keeps Python's lock
        ctypes.PyDLL(None).sleep(600)
    elif whom != "once" or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        os.kill(os.getppid() if whom == "launcher" else os.getpid(), _SIGNALS[name])


def _step_with(forward_backward, run_step, trainer, *rest):
    """Do a step with another forward and backward pass."""
    original, trainer.forward_backward = trainer.forward_backward, forward_backward
    try:
        return run_step(trainer, *rest)
    finally:
        trainer.forward_backward = original


def _scale(run_step, trainer, *rest):
    """Do a step with gradients that are a little too large."""
    original = trainer.forward_backward

    def scaled(*given):
        loss = original(*given)
        for _, parameter in trainer.parameters:
            parameter.grad.mul_(1.01)
        return loss

    return _step_with(scaled, run_step, trainer, *rest)


def _nan(run_step, trainer, *rest):
    """Do a step whose loss is no number, and say whether it has moved a weight."""
    original = trainer.forward_backward
    before = [parameter.detach().clone() for _, parameter in trainer.parameters]
    try:
        return _step_with(lambda *given: original(*given) * float("nan"), run_step, trainer, *rest)
    finally:
        moved = sum(not (old == new).all() for old, (_, new) in zip(before, trainer.parameters, strict=True))
        print(f"planted nan: {moved} weights moved", flush=True)


_WRONG = {"nan": _nan, "scale": _scale}

if "PLANTED_FAULT" in os.environ:
    sys.meta_path.insert(0, _Plant([_parse(text) for text in os.environ["PLANTED_FAULT"].split(";")]))
