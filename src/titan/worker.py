"""One rank's whole life: `python -m titan.worker <run.dir>/config.yaml`.

The frozen config is all that a rank reads. Started alone, it is rank 0 of 1; started by torchrun, by titan's local
launcher or by a SLURM step, it is whichever rank the environment says. Whatever ends it, the exit code says what it
was (`titan.errors`), and the log file says where.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import multiprocessing
import os
import re
import resource
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from titan.config.load import config_text, load_config, parse_config
from titan.config.schema import Device, TitanConfig
from titan.errors import INTERRUPTED, ConfigError, PeerLost, Problem, StepHung, Stopped, TitanError
from titan.launch import signals
from titan.launch.dispatch import Frozen, already_complete, freeze
from titan.launch.environment import (
    CONFIG_DIGEST,
    Rank,
    adopt_slurm_step,
    config_digest,
    current_rank,
    launcher_pid,
    threads_per_rank,
)
from titan.launch.lock import RunInUse, RunLock
from titan.log import logger, start_logging, start_rank_log
from titan.run_directory import RunDirectory

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store

    from titan.data.feed import StreamedText
    from titan.data.rows import Rows
    from titan.trainer.build import Trainer

_LEAVE_SECONDS = 60.0
_POLL_SECONDS = 0.05
_LOST_PEER = re.compile(
    r"Connection (closed|reset) by (remote )?peer|Connection was likely closed|ncclRemoteError|Broken pipe"
)
"""How gloo, NCCL and the ranks' store speak of a rank that is gone; gloo has no exception of its own for it."""


Job = Callable[[TitanConfig, Rank, "Store | None"], float | None]
"""What a rank does: `train`, or what another command wants done on the same ranks; returns the last loss."""


def main(arguments: list[str] | None = None, job: Job | None = None, on_console: bool = True) -> int:
    """Run the rank that the environment describes; returns its exit code.

    Args:
        arguments: The command line without the program.
        job: What to do; None trains.
        on_console: Whether rank 0 speaks on the console; every rank has its log file in any case.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    start_logging()
    signals.hold_warnings()
    die_with_launcher()
    if launcher_pid() is not None:
        signals.hold_interrupt(True)  # until there is somebody to account for it
    if len(arguments) != 1:
        print("usage: python -m titan.worker <run.dir>/config.yaml", file=sys.stderr)
        return 2
    try:
        config = load_config(Path(arguments[0]))
        check_is_launchers(Path(arguments[0]))
        adopt_slurm_step(is_rank=True)
        rank = current_rank()
    except TitanError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    os.environ |= config.cluster.environment
    if job is None and RunDirectory(Path(config.run.dir)).is_complete(config.training.steps):
        logger.info(f"{config.run.dir}: this run is complete (step {config.training.steps}); nothing to do")
        return 0
    return run_rank(config, rank or Rank(), job=job, on_console=on_console)


def check_is_launchers(path: Path) -> None:
    """See that the config is the one that this rank's launcher has frozen, if titan's own has started it.

    Raises:
        ConfigError: If another command has changed it since.
    """
    frozen = os.environ.get(CONFIG_DIGEST)
    if frozen is not None and config_digest(path) != frozen:
        raise ConfigError(
            [
                Problem(
                    f"{path} was changed by another command just after this run was started",
                    suggestion="the same command again, or  run.dir=ANOTHER   for one of the two",
                )
            ]
        )


def run_started_rank(config: TitanConfig, rank: Rank, overrides: list[str]) -> int:
    """Train as a rank that an outer launcher started together with the composition; returns the exit code.

    Every rank has composed a config, with a time of its own in the name of the run directory. Rank 0's is the one:
    it freezes it and hands it to the others. Where it refuses, it says why and the others just end.
    """
    signals.hold_warnings()
    os.environ |= config.cluster.environment
    store = meet(rank, config.cluster.timeout_seconds)
    key = "titan/config"
    if rank.rank == 0:
        directory = RunDirectory(Path(config.run.dir))
        try:
            found = freeze(config, directory, overrides)
        except ConfigError as error:
            # said before the others know: once one of them ends, the launcher ends this one too
            print(error, file=sys.stderr, flush=True)
            store.set(key, "refused")
        else:
            if found is Frozen.complete:
                logger.info(already_complete(config, directory))
            store.set(key, "complete" if found is Frozen.complete else config_text(config))
    text = store.get(key).decode()
    if text in ("refused", "complete"):
        _leave_store(store, f"{key}/left", rank)
        return ConfigError.exit_code if text == "refused" else 0
    return run_rank(parse_config(text, "the config of rank 0"), rank, store)


def meet(rank: Rank, timeout_seconds: int) -> Store:
    """Return the store in which the ranks of the environment's launcher meet."""
    from torch.distributed import rendezvous

    store = next(rendezvous("env://", timeout=timedelta(seconds=timeout_seconds)))[0]
    can_restart = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
    return _fresh(store, rank, timeout_seconds) if can_restart else store


def _fresh(store: Store, rank: Rank, timeout_seconds: int) -> Store:
    """Return a part of the store that no earlier attempt has written to.

    After torchrun has restarted its ranks they may find the store of the attempt before, whose addresses lead nowhere.
    How often each machine's agent has restarted differs, so it cannot name the part. Rank 0 invents a name at every
    start; the others take the newest that they see, and know that it is not an old one when rank 0 answers what they
    have just said.
    """
    from torch.distributed import PrefixStore

    said = uuid.uuid4().hex
    if rank.rank == 0:
        part = PrefixStore(said, store)
        store.set("titan/newest", said)
        for other in range(1, rank.world_size):
            part.set(f"answer/{other}", part.get(f"said/{other}").decode())
        return part
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        newest = store.get("titan/newest")
        part = PrefixStore(newest.decode(), store)
        part.set(f"said/{rank.rank}", said)
        answer = f"answer/{rank.rank}"
        while not part.check([answer]) and store.get("titan/newest") == newest:
            time.sleep(_POLL_SECONDS)
        if part.check([answer]) and part.get(answer).decode() == said:
            return part
        time.sleep(_POLL_SECONDS)
    raise PeerLost(f"rank 0 did not start within {timeout_seconds} s")


def _leave_store(store: Store, key: str, rank: Rank) -> None:
    """Wait on rank 0, which may be the store's host, until the others have read what they came for."""
    left = store.add(key, 1)
    deadline = time.monotonic() + _LEAVE_SECONDS
    while rank.rank == 0 and left < rank.world_size and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        left = store.add(key, 0)


def run_rank(
    config: TitanConfig,
    rank: Rank,
    store: Store | None = None,
    job: Job | None = None,
    on_console: bool = True,
) -> int:
    """Do a rank's job, training if no other, and account for how it ended; returns the exit code."""
    allow_open_files()
    directory = RunDirectory(Path(config.run.dir))
    lock, loss_before = RunLock(directory), directory.read_status().get("loss")
    try:
        store = _enter_run(config, rank, store, lock, on_console)
    except RunInUse as error:
        return error.exit_code
    except (Exception, KeyboardInterrupt) as error:
        return _account(directory, rank, error, may_write=rank.rank == 0)
    try:
        loss = (job or train)(config, rank, store)
        if rank.rank == 0:
            # no loss where another attempt had already done the last step
            loss = loss_before if loss is None else loss
            directory.write_status("complete", step=config.training.steps, loss=loss)
            directory.append_event("exit", code=0)
    except Stopped as stop:
        return _report_stop(directory, rank, stop)
    except (Exception, KeyboardInterrupt) as error:
        return _account(directory, rank, error)
    finally:
        lock.release()
    return 0


def allow_open_files() -> None:
    """Let this process have as many files open as it may allow itself.

    Each process group over gloo keeps a socket to every other rank, so that some hundred ranks are more than the 1024
    files that many systems begin with.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # what a container allows may be less than what it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _enter_run(config: TitanConfig, rank: Rank, store: Store | None, lock: RunLock, on_console: bool) -> Store | None:
    """Have the run directory for this run's own, and say that it runs.

    Rank 0 takes the lock, before it writes anything, and tells the others, who have no say in it. Until they know,
    the files may be another run's.

    Returns:
        The store in which the ranks meet, if a launcher has named one.

    Raises:
        RunInUse: On every rank, if another run has the directory; rank 0 has said so on the console.
    """
    is_first, directory = rank.rank == 0, lock.directory
    refusal = _take(lock) if is_first else None
    if refusal is None:
        start_rank_log(directory.log(rank.rank, rank.attempt), rank.rank, on_console=on_console and is_first)
    if is_first and refusal is None:
        directory.write_status("running")
        directory.append_event("start", ranks=rank.world_size, attempt=rank.attempt)
    if rank.has_store:
        import torch.distributed  # noqa: F401  # some seconds, which better come to an end

        signals.hold_interrupt(False)
        store = store or meet(rank, config.cluster.timeout_seconds)
        key, mine = "titan/run", hashlib.sha256(config_text(config).encode()).hexdigest()
        if is_first:
            store.set(key, "refused" if refusal else mine)
        found = store.get(key).decode()
        if found == "refused":
            _leave_store(store, f"{key}/left", rank)
            raise refusal or RunInUse(directory)
        if found != mine:
            raise ConfigError(f"{directory.config} was changed by another command while this run was starting")
    elif refusal is not None:
        raise refusal
    return store


def _take(lock: RunLock) -> RunInUse | None:
    """Take the lock; returns why not, having said it: once a rank ends, the launcher may end this one too."""
    try:
        lock.acquire()
    except RunInUse as refusal:
        print(refusal, file=sys.stderr, flush=True)
        return refusal
    return None


def train(
    config: TitanConfig,
    rank: Rank,
    store: Store | None = None,
    around: Callable[[Trainer], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    warning: Callable[[Trainer], int] = lambda trainer: signals.warning(),
) -> float | None:
    """Build a trainer and run it to the end; returns the last loss.

    Args:
        config: Frozen.
        rank: This rank's place.
        store: Where the ranks meet; None for a rank that is alone.
        around: Returns the context in which a trainer that is ready trains.
        warning: Returns the signal that has told this rank to stop, or 0.
    """
    import torch.distributed as dist

    from titan.trainer.build import build_trainer, load_held_out
    from titan.trainer.loop import fit
    from titan.trainer.resume import resume
    from titan.trainer.watchdog import Watchdog, describe_limits

    directory = RunDirectory(Path(config.run.dir))
    # before the ranks have joined, so that no collective waits for it
    held_out = load_held_out(config, is_writer=rank.local_rank == 0)
    device, data = join_ranks(config, rank, store)
    with contextlib.ExitStack() as stack:
        watchdog = Watchdog(
            config.fault_tolerance,
            directory,
            rank.rank,
            rank.world_size,
            rank.attempt,
            report=lambda hung: _account(directory, rank, hung),
        )
        stack.enter_context(watchdog)
        trainer = build_trainer(config, device, data, held_out)
        gc.enable()  # paused since the process began
        logger.info(f"{'watchdog':<10} {describe_limits(config)}")
        if line := describe_long_warmup(config):
            logger.info(line)
        resume(trainer)
        if trainer.state.step and rank.rank == 0:
            directory.append_event("resume", step=trainer.state.step)
        is_first = rank.rank == 0
        stack.enter_context(
            signals.OrderlyStop(
                directory.read_failure,
                interrupt=lambda: _end_at_once(directory, rank),
                has_launcher=launcher_pid() is not None,
                is_console=is_first,
            )
        )
        if is_first:  # from here on there is something to save, which the launcher wants to know
            directory.write_status("running", step=trainer.state.step)
        stack.enter_context(around(trainer))
        loss = fit(trainer, watchdog, lambda: warning(trainer))
    dist.destroy_process_group()
    return loss


def describe_long_warmup(config: TitanConfig) -> str:
    """Say that a run ends before its learning rate is at its peak; nothing where it does not."""
    warmup, steps = config.lr_scheduler.warmup_steps, config.training.steps
    if warmup <= steps:
        return ""
    return (
        f"{'schedule':<10} the peak learning rate is never reached: lr_scheduler.warmup_steps = {warmup} exceeds "
        f"training.steps = {steps}"
    )


def join_ranks(config: TitanConfig, rank: Rank, store: Store | None = None) -> tuple[torch.device, Rows | StreamedText]:
    """Make this rank's device and data ready and start the default process group.

    Args:
        config: Frozen.
        rank: This rank's place.
        store: Where the ranks meet; None for a rank that is alone.
    """
    import torch.distributed as dist

    from titan.models.family import load_family
    from titan.parallel.compile import check_backend
    from titan.parallel.float8 import check_float8_units
    from titan.trainer.build import load_data
    from titan.trainer.device import make_deterministic, select_device

    if config.training.deterministic:
        make_deterministic()
    device = select_device(config.cluster.device, rank.local_rank, threads_per_rank(rank.local_world_size))
    # before the data, which may take long
    check_float8_units(config.float8, device)
    check_backend(config.compile)
    load_family(config.model.family)
    data = load_data(config, is_writer=rank.local_rank == 0)
    backend = "nccl" if config.cluster.device is Device.cuda else "gloo"
    if device.type == "cuda" and config.parallelism.cpu_offload:
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend,
        store=store or dist.HashStore(),
        rank=rank.rank,
        world_size=rank.world_size,
        timeout=timedelta(seconds=config.cluster.timeout_seconds),
        device_id=device if device.type == "cuda" else None,
    )
    return device, data


def _end_at_once(directory: RunDirectory, rank: Rank) -> None:
    """Account for a second Ctrl-C, in a thread, and leave no process."""
    _account(directory, rank, KeyboardInterrupt())
    for reader in multiprocessing.active_children():
        reader.kill()


def _report_stop(directory: RunDirectory, rank: Rank, stop: Stopped) -> int:
    import torch.distributed as dist

    if rank.rank == 0:
        logger.info(str(stop))
        directory.append_event("signal", signal=stop.signal_name, step=stop.step)
        directory.write_status(
            "preempted", why=str(stop), step=stop.step, signal=stop.signal_name, saved_step=stop.saved_step
        )
        directory.append_event("exit", code=stop.exit_code)
    # The first rank to leave may take the others with it, so none leaves before all is written; and then all leave at
    # once, for taking the process groups down takes each of them another time.
    dist.barrier()
    return stop.exit_code


def _account(directory: RunDirectory, rank: Rank, error: BaseException, may_write: bool = True) -> int:
    """Say in the log and in the run directory what ended this rank; returns the exit code.

    Args:
        directory: The run's.
        rank: This rank's place.
        error: What ended it.
        may_write: Whether the directory is known to be this run's.
    """
    code, text = 1, str(error)
    if isinstance(error, TitanError):
        code = error.exit_code
    elif isinstance(error, KeyboardInterrupt):
        code, text = INTERRUPTED, "interrupted"
        if rank.has_store and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's and the launcher's are the same Ctrl-C
    else:
        text = "".join(traceback.format_exception(error)).rstrip()
        if words := _LOST_PEER.search(str(error)):
            logger.debug(text)
            error = PeerLost(f"another rank ended while this one waited for it ({words.group()})")
            text = str(error)
    logger.error(text)
    summary = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    is_hang = isinstance(error, StepHung)
    blamed = error.ranks[0] if is_hang else rank.rank
    is_main = threading.current_thread() is threading.main_thread()
    if rank.has_store and is_main and not is_hang:  # of which the agent would name a rank that has waited
        tell_agent(error)
    if may_write:
        if directory.read_status().get("state") == "running":  # the first to fail says why
            directory.write_status("failed", why=summary, rank=blamed, attempt=rank.attempt, exit_code=code)
        directory.append_event("exit", code=code, rank=rank.rank, why=summary)
    return code


def tell_agent(error: BaseException) -> None:
    """Leave the error where the elastic agent looks for it, so that it can name the rank that failed first."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    # The agent may be ending all ranks at this moment, and half a file would be the end of the agent itself. This rank
    # ends in any case.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    get_error_handler().record_exception(error)


def die_with_launcher() -> None:
    """Ask the kernel to end this rank when titan's local launcher dies, however it dies."""
    pid = launcher_pid()
    if pid is None or sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != pid:  # it died before we asked
        sys.exit(1)


if __name__ == "__main__":
    gc.disable()  # importing makes a million objects that stay; until a rank trains
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: after a failure, other threads may hang in a collective that no one will join any more.
    os._exit(code)
