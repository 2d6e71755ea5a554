"""A fault in one rank: put this folder on PYTHONPATH and say in PLANTED_FAULT what happens, where and when.

Python imports a module of this name before it runs anything, so the code under test stays as it is: the fault is
planted when, and only where, `titan.trainer.step` is imported.
"""

import ctypes
import importlib.util
import os
import sys
import time


class _Plant:
    """Wraps `train_step` as soon as its module has been loaded."""

    def find_spec(self, name, path=None, target=None):
        if name != "titan.trainer.step":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_wrap(module):
            load(module)
            module.train_step = _wrap(module.train_step)

        spec.loader.exec_module = load_and_wrap
        return spec


def _wrap(train_step):
    fault, rank, at = os.environ["PLANTED_FAULT"].split(":")
    done = 0
    if fault == "read" and os.environ.get("RANK", "0") == rank:
        _hang_when_reading(int(at))
    if fault == "environment":  # how long the values of some variables are: of a secret, more would be told
        print(*(f"{name} {len(os.environ.get(name, ''))}" for name in rank.split(",")), flush=True)
    if fault == "slow":  # every step of every rank

        def slow(*given):
            time.sleep(float(at))
            return train_step(*given)

        return slow

    def faulty(batches, forward_backward, *rest):
        nonlocal done
        done += 1
        if done == int(at) and os.environ.get("RANK", "0") == rank:
            if fault == "error":
                raise RuntimeError("a planted error")
            if fault == "kill":
                os.kill(os.getpid(), 9)
            if fault == "kill_once" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
                os.kill(os.getpid(), 9)
            if fault == "sleep":
                time.sleep(600)
            if fault == "stop":  # does not answer any more, and is not gone either
                os.kill(os.getpid(), 19)
            if fault == "lock":  # hangs in native code that keeps Python's lock
                ctypes.PyDLL(None).sleep(600)
            if fault == "scale":  # gradients a little too large

                def scaled(*given):
                    loss = forward_backward(*given)
                    for parameter in rest[0]:
                        parameter.grad.mul_(1.01)
                    return loss

                return train_step(batches, scaled, *rest)
            if fault == "nan":
                before = [parameter.detach().clone() for parameter in rest[0]]
                try:
                    return train_step(batches, lambda *given: forward_backward(*given) * float("nan"), *rest)
                finally:
                    moved = sum(not (old == new).all() for old, new in zip(before, rest[0], strict=True))
                    print(f"planted nan: {moved} weights moved", flush=True)
        return train_step(batches, forward_backward, *rest)

    return faulty


def _hang_when_reading(at):
    """Let every process that reads rows (2 a step, as TINY has them) hang at a row of a step."""
    from titan.data.loader import PackedRows

    read, rows = PackedRows.__getitem__, 0

    def hang(*given):
        nonlocal rows
        rows += 1
        if rows > 2 * (at - 1):
            time.sleep(600)
        return read(*given)

    PackedRows.__getitem__ = hang


if "PLANTED_FAULT" in os.environ:
    sys.meta_path.insert(0, _Plant())
