"""Ranks that stay alive between tests, forked from a process that has imported all they need.

Importing torch in every rank would take longer than most tests do. Each job gets a process group of its own over gloo
and leaves none behind. What PyTorch keeps beyond that is bounded: ranks are replaced after some jobs. One that dies
says where it was, in Python and in native code, on the standard error that pytest shows with the failed test.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import reduction
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

JOBS_OF_A_PROCESS = 40
"""A run has a process to itself. PyTorch keeps things of earlier ones that no call ends: the flight recorder has the
last 2000 exchanges with all the code that led to them (2.13)."""

_PRELOADED = ["tests.parallel.layouts", "titan.trainer.loop", "torch._dynamo", "torch.distributed.pipelining"]
_NICENESS = 10
_LONGEST_SECONDS = 1500
"""How long a job may take, however busy its ranks are."""


class RankPool:
    """`world_size` processes, each one thread, that run functions together.

    A function is sent by name, so it has to live in a module.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.pipes: list[Any] = []
        self.processes: list[Any] = []
        self.jobs = 0

    def run(self, function: Callable[..., Any], *arguments: Any, patience: float = 60) -> list[Any]:
        """Run a function on every rank, inside a process group; returns what each rank returned.

        Ranks hang that do nothing, not ones that take long: a slow or busy machine makes no test fail.

        Args:
            function: By its name in a module.
            *arguments: For it.
            patience: For how many seconds the ranks may use next to no processor.

        Raises:
            AssertionError: With the traceback of the first rank that raised, or if a rank died or ranks hang, which
                say where they are. They are then ended, since others may hang in a collective, and started anew for
                the next function.
        """
        if self.jobs == JOBS_OF_A_PROCESS:
            self.close()
        if not self.processes:
            self._start()
        self.jobs += 1
        with tempfile.TemporaryDirectory() as folder:
            for pipe in self.pipes:
                pipe.send((function, arguments, f"{folder}/store"))
            answers: dict[int, Any] = {}
            has_left = False
            begin, used = time.monotonic(), self._used_seconds()
            while len(answers) < self.world_size:
                waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in answers]
                ready = wait(waiting, patience)
                for pipe in ready:
                    rank = self.pipes.index(pipe)
                    try:
                        succeeded, answers[rank], groups = pipe.recv()
                        has_left |= groups > 0
                    except EOFError:
                        succeeded, answers[rank] = False, f"rank {rank} is gone"
                    if not succeeded:
                        deaths = self._deaths()
                        self.close()
                        raise AssertionError("\n".join([answers[rank], *deaths]))
                if not ready:
                    before, used = used, self._used_seconds()
                    if used - before < patience / 100 or time.monotonic() - begin > _LONGEST_SECONDS:
                        hanging = [rank for rank in range(self.world_size) if rank not in answers]
                        self._show_stacks(hanging)
                        self.close()
                        raise AssertionError(f"ranks {hanging} hang")
        if has_left:  # compiled code refers to the mesh that it was compiled for
            self.close()
        return [answers[rank] for rank in range(self.world_size)]

    def close(self) -> None:
        """End the ranks."""
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.pipes, self.jobs = [], [], 0

    def _used_seconds(self) -> float:
        """Return how much processor time the ranks, and compilers that they waited for, have used, on Linux."""
        ticks = 0
        for process in self.processes:
            with contextlib.suppress(OSError):  # it has died, which its pipe tells
                ticks += sum(map(int, Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:15]))
        return ticks / os.sysconf("SC_CLK_TCK")

    def _show_stacks(self, ranks: list[int]) -> None:
        for rank in ranks:
            if self.processes[rank].is_alive():
                os.kill(self.processes[rank].pid, signal.SIGUSR1)
                time.sleep(0.5)  # for each to write on its own

    def _deaths(self) -> list[str]:
        """Return which ranks have died, and how: where one dies, another may be first to report that it is gone."""
        ended = wait([process.sentinel for process in self.processes], 1)
        for process in self.processes:
            process.join(10 if process.sentinel in ended else 0)  # it closes its files a moment before it has a code
        codes = {rank: process.exitcode for rank, process in enumerate(self.processes)}
        return [
            f"rank {rank} died of {signal.Signals(-code).name}" if code < 0 else f"rank {rank} ended with code {code}"
            for rank, code in codes.items()
            if code is not None
        ]

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world_size, theirs), daemon=True)
            process.start()
            reduction.send_handle(ours, 2, process.pid)  # it was forked from one that has what pytest set long ago
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _serve(rank: int, world_size: int, pipe: Any) -> None:
    import torch
    import torch.distributed as dist

    from titan.parallel.mesh import leave_process_group

    os.dup2(reduction.recv_handle(pipe), 2)
    if world_size > (os.cpu_count() or 1):
        os.nice(_NICENESS)  # or sixteen ranks would starve the one of a test beside them
    torch.set_num_threads(1)
    torch._C._set_print_stack_traces_on_fatal_signal(True)  # native ones, of all threads
    faulthandler.enable()  # Python's; after the others, so that these are written first
    faulthandler.register(signal.SIGUSR1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    leave_process_group()  # it has seen all caches before they are hidden from it
    gc.freeze()  # all modules, which every later collection would look through, and nothing of a job
    while True:
        try:
            function, arguments, store = pipe.recv()
        except EOFError:
            return
        try:
            dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
            try:
                dist.barrier()  # or a short job closes connections that another rank is still making
                answer = (True, function(*arguments))
            finally:
                if "torch._dynamo" in sys.modules:  # or the layouts of many tests would count as one program's
                    torch._dynamo.reset()
                leave_process_group()
        except BaseException:
            answer = (False, f"rank {rank}:\n{traceback.format_exc()}")
        pipe.send((*answer, count_groups()))


def count_groups() -> int:
    """Return how many gloo groups this process has, as the threads tell that serve their connections, on Linux."""
    groups = 0
    for path in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            groups += path.read_text() == "gloo_tcp_loop\n"
    return groups
