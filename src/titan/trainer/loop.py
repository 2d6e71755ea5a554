"""fit: for every step, batch → forward and backward → clip → optimizer → metrics → checkpoint."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from titan.config.degrees import accumulation_steps
from titan.data.loader import Batch, build_loader
from titan.errors import Stopped
from titan.log import logger
from titan.metrics.memory import peak_memory_gib, reset_peak_memory
from titan.metrics.meter import Meter, bits_per_byte
from titan.metrics.sinks import Console, JsonLines, format_seconds
from titan.models.flops import peak_tflops
from titan.optim.schedule import lr_factor, set_learning_rate
from titan.trainer.build import Trainer
from titan.trainer.device import GarbageCollector, device_name
from titan.trainer.profile import Profile
from titan.trainer.step import StepResult, train_step
from titan.trainer.watchdog import Watchdog


def fit(trainer: Trainer, watchdog: Watchdog, warning: Callable[[], int] = lambda: 0) -> float | None:
    """Train from where the state stands to the last step.

    Args:
        trainer: Built, and resumed where there is something to resume.
        watchdog: Is told of every step.
        warning: Returns the signal that has told this rank to stop, or 0. One rank's is enough for all.

    Returns:
        The loss of the last step, or None where there was nothing left to do.

    Raises:
        Stopped: After a warning, on every rank after the same step, once that is saved.
    """
    config, state = trainer.config, trainer.state
    steps = config.training.steps
    is_writer = dist.get_rank() == 0
    meter = build_meter(trainer)
    with contextlib.ExitStack() as stack:
        sinks: list[JsonLines | Console] = []
        console = None
        if is_writer:
            console = Console(steps, state.step, (trainer.packed.tokens, trainer.packed.text_bytes))
            sinks = [JsonLines(trainer.directory.metrics, state.step), console]
            for sink in sinks:
                stack.callback(sink.close)
        collector = stack.enter_context(GarbageCollector(config.training.gc_interval))
        profile = stack.enter_context(Profile(config.profiling, trainer.directory.profiles, dist.get_rank()))
        result = None
        began, batches = time.perf_counter(), steps_of_batches(trainer, meter)
        reset_peak_memory(trainer.device)
        while state.step < steps:
            watchdog.step(state.step + 1)
            result, learning_rate = run_step(trainer, next(batches))
            meter.steps += 1
            if console is not None:
                console.step()
            if state.step == 1 or state.step % config.metrics.log_every == 0 or state.step == steps:
                write_metrics(trainer, meter, result, learning_rate, sinks)
            told = warning_of_any_rank(trainer, warning) if state.step < steps else 0
            with watchdog.extended():
                save_if_due(trainer, meter, is_last=told > 0)
            if told:
                raise Stopped(signal.Signals(told).name, state.step, trainer.store is not None)
            profile.step()
            collector.step(state.step)
    if is_writer and result is not None:
        bits = bits_per_byte(result.loss, trainer.packed.tokens, trainer.packed.text_bytes)
        logger.info(
            f"done: step {state.step}, loss {result.loss:.4f} nats a token = {bits:.3f} bits a byte, "
            f"{state.tokens:,} tokens, {format_seconds(time.perf_counter() - began)}"
        )
    return result.loss if result is not None else None


def run_step(trainer: Trainer, batches: list[Batch]) -> tuple[StepResult, float]:
    """Take the next step with its learning rate, and count it; returns what it gave and that rate."""
    config, state = trainer.config, trainer.state
    learning_rate = config.optimizer.lr * lr_factor(state.step, config.training.steps, config.lr_scheduler)
    set_learning_rate(trainer.optimizer, learning_rate)
    result = train_step(
        batches,
        trainer.forward_backward,
        [parameter for _, parameter in trainer.parameters],
        trainer.optimizer,
        config.training.max_grad_norm,
        trainer.mesh.loss_group,
        trainer.mesh.stage_group,
        trainer.copies,
    )
    state.step += 1
    state.tokens += trainer.tokens_per_step
    return result, learning_rate


def build_meter(trainer: Trainer) -> Meter:
    """Return a meter that knows the model and the device."""
    config = trainer.config
    return Meter(
        tokens_per_step=trainer.tokens_per_step,
        flops_per_token=trainer.family.flops_per_token(config.model, config.training.seq_len),
        devices=dist.get_world_size(),
        peak_tflops=peak_tflops(device_name(trainer.device), config.training.param_dtype),
    )


def steps_of_batches(trainer: Trainer, meter: Meter) -> Iterator[list[Batch]]:
    """Yield each step's micro-batches on the device; the time waited for them goes into the meter."""
    config = trainer.config
    loader = iter(
        build_loader(
            trainer.rows,
            trainer.share,
            trainer.state.step,
            config.training.steps,
            config.data.num_workers,
            pin_memory=trainer.device.type == "cuda",
        )
    )
    while True:
        start = time.perf_counter()
        batches = [next(loader).at(trainer.positions).to(trainer.device) for _ in range(accumulation_steps(config))]
        meter.data_seconds += time.perf_counter() - start
        yield batches


def write_metrics(
    trainer: Trainer, meter: Meter, result: StepResult, learning_rate: float, sinks: list[JsonLines | Console]
) -> None:
    """Write one row to every sink; all ranks take part, for the fullest one's memory counts."""
    memory = torch.tensor(peak_memory_gib(trainer.device), device=trainer.device)
    dist.all_reduce(memory, op=dist.ReduceOp.MAX)
    reset_peak_memory(trainer.device)
    row = meter.row(trainer.state.step, result.loss, result.grad_norm, learning_rate, memory.item())
    for sink in sinks:
        sink.write(row)


def warning_of_any_rank(trainer: Trainer, warning: Callable[[], int]) -> int:
    """Return the same signal on every rank, or 0; one rank may have been told before, or instead of, the others."""
    if dist.get_world_size() == 1:
        return warning()
    told = torch.tensor(warning(), device=trainer.device)
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return int(told.item())


def save_if_due(trainer: Trainer, meter: Meter, is_last: bool = False) -> None:
    """Save a checkpoint at every interval, at the end, and before the run is stopped."""
    config, step = trainer.config, trainer.state.step
    is_last |= step == config.training.steps
    if trainer.store is None or (step % config.checkpoint.interval and not is_last):
        return
    start = time.perf_counter()
    path = trainer.store.save(step, trainer.parameters, trainer.optimizer, {"tokens": trainer.state.tokens})
    seconds = time.perf_counter() - start
    meter.checkpoint_seconds += seconds
    if dist.get_rank() == 0:
        logger.info(f"saved {path.relative_to(trainer.directory.path)} in {seconds:.2f} s")
        trainer.directory.append_event("save", step=step, seconds=round(seconds, 3))
