"""fit: for every step, batch → forward and backward → clip → optimizer → metrics → checkpoint → validation.

The host is ahead of a GPU: `titan.trainer.pending` says what it knows when.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Collection, Generator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from titan.config.schema import CheckpointContent, TitanConfig
from titan.data.digest import format_digest, to_signed
from titan.data.loader import Step
from titan.errors import NonFiniteError, Stopped
from titan.log import logger
from titan.metrics.memory import device_memory_gib, peak_memory_gib, reset_peak_memory
from titan.metrics.meter import Meter, bits_per_byte
from titan.metrics.opening import open_all
from titan.metrics.sinks import JsonLines, Sink, format_seconds
from titan.models.flops import peak_tflops
from titan.optim.schedule import lr_factor, set_learning_rate
from titan.trainer.ahead import prepare_steps
from titan.trainer.breakdown import DATA
from titan.trainer.build import Trainer
from titan.trainer.compilations import Compilations
from titan.trainer.device import GarbageCollector, device_name, keep_freed_memory
from titan.trainer.pending import Exchange, PendingSteps, TakenStep, agree
from titan.trainer.profile import Profile
from titan.trainer.saving import Saver, Wishes
from titan.trainer.spikes import Ledger
from titan.trainer.step import StepResult, train_step
from titan.trainer.validation import Validator
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
        Stopped: After a warning, on every rank after the same step, once that is saved; in a validation, which the
            run then does when it goes on.
        DataError: If the held-out text has nothing to predict.
        NonFiniteError: At a spike that `fault_tolerance.on_spike` does not get over.
        StorageError: When saving has failed `checkpoint.max_failures` times in a row.
    """
    config, state = trainer.config, trainer.state
    steps = config.training.steps
    meter = build_meter(trainer)
    with contextlib.ExitStack() as stack:
        saver, ledger = Saver(trainer, meter), Ledger(trainer)
        stack.callback(saver.close)
        sinks = open_sinks(trainer)
        for sink in sinks:
            stack.callback(sink.close)
        validator = Validator(trainer, meter, sinks, watchdog, lambda: end_if_told(trainer, saver, warning))
        stack.callback(validator.close)
        collector = stack.enter_context(GarbageCollector(config.training.gc_interval))
        profile = stack.enter_context(
            Profile(config.profiling, trainer.directory.profiles, dist.get_rank(), state.step)
        )
        result, compilations = None, Compilations(config.compile.enable)
        rows_log = open_rows_log(trainer)
        if rows_log is not None:
            stack.callback(rows_log.close)
        began, reader = time.perf_counter(), StepReader(trainer, meter, ledger.steps)
        stack.callback(lambda: reader.close())
        reset_peak_memory(trainer.device)
        if config.checkpoint.save_initial and trainer.state.step == 0:
            save_surely(trainer, saver, watchdog, warning)
        pending, exchange = PendingSteps(), Exchange(trainer)
        while (state := trainer.state).step < steps:
            validator.run_if_due()
            step, has_gone_back = state.step + 1, False
            if step in ledger.steps:
                reader.pass_over(step)
                state.step += 1
            else:
                watchdog.step(step)
                compilations.begin()
                pending.add(run_step(trainer, reader.read(step), saver.wait_for_copies, ledger.spikes_left))
                compilations.end(step)
            news = exchange.hear()
            is_known_at_once = not trainer.defers or is_logged(config, step) or saver.is_due(step)
            is_known_at_once |= validator.is_due(step) or bool(news.told or news.wishes.is_due)
            for taken in pending.take(step if is_known_at_once else news.here):
                try:
                    result = taken.result.read()
                except NonFiniteError as spike:
                    with watchdog.extended():
                        has_gone_back = ledger.answer(spike, taken.before, saver)
                    if has_gone_back:
                        break
                    continue
                if taken.number < step:
                    watchdog.step(step)  # the device has come on by a step
                meter.steps += 1
                if rows_log is not None:
                    rows_log.write(describe_rows(trainer, taken.number, result))
                if is_logged(config, taken.number):
                    write_metrics(trainer, meter, result, taken.learning_rate, sinks)
            if has_gone_back:
                pending.forget()
                reader.close()
                reader = StepReader(trainer, meter, ledger.steps)
                for sink in (*sinks, *([rows_log] if rows_log is not None else [])):
                    sink.rewind(trainer.state.step)
                validator.rewind(trainer.state.step)
                continue
            for sink in sinks:
                sink.step()
            with watchdog.extended():
                profile.step(step)
            told, wishes = news.told if step < steps else 0, news.wishes
            if is_known_at_once:
                now, wishes = agree(trainer, warning() if step < steps else 0, saver.wishes())
                told, wishes = max(told, now), replace(wishes, is_due=max(wishes.is_due, news.wishes.is_due))
            with watchdog.extended():
                if told:
                    raise Stopped(signal.Signals(told).name, step, saver.save_now())
                saver.after_step(wishes)
            if trainer.defers and step < steps:
                exchange.tell(warning(), saver.wishes(), pending.before_first_away(step))
            collector.step(step)
        if config.checkpoint.last_content is CheckpointContent.weights:  # from which no validation could go on
            validator.run_if_due()
        save_surely(trainer, saver, watchdog, warning, config.checkpoint.last_content)
        validator.run_if_due()
    if dist.get_rank() == 0 and result is not None:
        bits = bits_per_byte(result.loss, *trainer.data.tokens_to_bytes)
        logger.info(
            f"done: step {state.step}, loss {result.loss:.4f} nats a token = {bits:.3f} bits a byte, "
            f"{state.tokens:,} tokens, {format_seconds(time.perf_counter() - began)}" + compilations.describe()
        )
    return result.loss if result is not None else None


def save_surely(
    trainer: Trainer,
    saver: Saver,
    watchdog: Watchdog,
    warning: Callable[[], int],
    content: CheckpointContent = CheckpointContent.all,
) -> None:
    """Save the step in hand, as often as it takes: the seed before the first step, and the end of the run.

    Raises:
        Stopped: After a warning between two tries.
        StorageError: After `checkpoint.max_failures` in a row.
    """
    while True:
        with watchdog.extended():
            if saver.try_to_save(content):
                return
        seconds = trainer.config.checkpoint.retry_seconds
        while seconds > 0:
            with watchdog.extended():  # second by second, for the wait may be longer than any limit
                told, _ = agree(trainer, warning(), Wishes())
                if told:
                    raise Stopped(signal.Signals(told).name, trainer.state.step, saver.saved_step)
                time.sleep(min(1.0, seconds))
            seconds -= 1.0


def end_if_told(trainer: Trainer, saver: Saver, warning: Callable[[], int]) -> None:
    """Save the step in hand and end, if any rank has been told to stop; all ranks take part.

    Raises:
        Stopped: After a warning.
    """
    told, _ = agree(trainer, warning(), Wishes())
    if told:
        raise Stopped(signal.Signals(told).name, trainer.state.step, saver.save_now())


def open_sinks(trainer: Trainer) -> list[Sink]:
    """Return where metrics go: from one rank to all that the config names, from the others nowhere."""
    if dist.get_rank() != 0:
        return []
    tokens_to_bytes = lambda: trainer.data.tokens_to_bytes  # noqa: E731  # it changes while streaming
    memory_gib = device_memory_gib(trainer.device)
    return open_all(trainer.config, trainer.directory, trainer.state.step, memory_gib, tokens_to_bytes)


def open_rows_log(trainer: Trainer) -> JsonLines | None:
    """Return where one rank writes down which rows every step had; None on the others."""
    return JsonLines(trainer.directory.rows, trainer.state.step) if dist.get_rank() == 0 else None


def is_logged(config: TitanConfig, step: int) -> bool:
    """Return whether a step has a row of metrics."""
    return step == 1 or step % config.metrics.log_every == 0 or step == config.training.steps


def describe_rows(trainer: Trainer, step: int, result: StepResult) -> dict[str, Any]:
    """Return a step's line for data.jsonl."""
    digest, padding = result.account
    row = {"step": step, "digest": format_digest(digest), "tokens": result.valid_tokens, "padding": padding}
    by_component = trainer.data.rows_by_component(step - 1)
    return row if by_component is None else row | {"rows": by_component}


def run_step(
    trainer: Trainer,
    rows: Step,
    before_update: Callable[[], None] = lambda: None,
    spikes_left: Tensor | None = None,
) -> TakenStep:
    """Hand out the next step with its learning rate, and count it; waits for no device.

    Args:
        trainer: Whose next step it is.
        rows: The step's, on this rank.
        before_update: Called before any weight or optimizer state changes.
        spikes_left: See `train_step`.
    """
    config, state = trainer.config, trainer.state
    before = replace(state)
    learning_rate = config.optimizer.lr * lr_factor(state.step, config.training.steps, config.lr_scheduler)
    set_learning_rate(trainer.optimizer, learning_rate)
    # ranks that share sequences have the same rows, which count once
    is_counted = trainer.mesh.coordinates["cp"] == 0
    result = train_step(
        rows.batches,
        trainer.forward_backward,
        [parameter for _, parameter in trainer.parameters],
        trainer.optimizer,
        config.training.max_grad_norm,
        trainer.mesh.loss_group,
        trainer.mesh.stage_group,
        trainer.copies,
        config.fault_tolerance.spike_grad_norm,
        before_update,
        (to_signed(rows.digest), rows.padding) if is_counted else (0, 0),
        spikes_left,
        trainer.weights_changed,
    )
    state.step += 1
    state.tokens += trainer.tokens_per_step
    if trainer.device.type == "cpu":
        keep_freed_memory()
    return TakenStep(before, learning_rate, result)


def build_meter(trainer: Trainer) -> Meter:
    """Return a meter that knows the model and the device."""
    config = trainer.config
    return Meter(
        tokens_per_step=trainer.tokens_per_step,
        flops_per_token=trainer.family.flops_per_token(config.model, config.training.seq_len),
        devices=dist.get_world_size(),
        peak_tflops=peak_tflops(device_name(trainer.device), config.training.param_dtype),
    )


def steps_of_batches(trainer: Trainer, meter: Meter, left_out: Collection[int] = ()) -> Generator[Step, None, None]:
    """Yield each step's micro-batches on the device; the time waited for them goes into the meter.

    Args:
        trainer: From whose next step on. Its data's cursors follow.
        meter: Takes the time.
        left_out: Steps, counted from 1, that come without any.
    """
    read = trainer.data.steps(trainer.state.step, trainer.config.training.steps, {step - 1 for step in left_out})
    steps = prepare_steps(read, trainer.device, trainer.positions)
    with contextlib.closing(steps):
        while True:
            start = time.perf_counter()
            with record_function(DATA):
                if (step := next(steps, None)) is None:
                    return
            trainer.data.cursors = step.cursors
            meter.data_seconds += time.perf_counter() - start
            yield step


class StepReader:
    """Reads the steps of a trainer, by number.

    Args:
        trainer: From whose next step on.
        meter: Takes the time waited.
        left_out: Steps, counted from 1, that come without rows.
    """

    def __init__(self, trainer: Trainer, meter: Meter, left_out: Collection[int]) -> None:
        self._steps = steps_of_batches(trainer, meter, left_out)
        self._number = trainer.state.step

    def read(self, number: int) -> Step:
        """Return the next step, which has that number."""
        step = next(self._steps)
        assert step.number == number, "steps are read in order"
        self._number = number
        return step

    def pass_over(self, number: int) -> None:
        """Pass over a step that is left out, unless it was read: at the time of the spike."""
        if self._number < number:
            self.read(number)

    def close(self) -> None:
        """End the processes that read ahead."""
        self._steps.close()


def write_metrics(trainer: Trainer, meter: Meter, result: StepResult, learning_rate: float, sinks: list[Sink]) -> None:
    """Write one row to every sink; all ranks take part, for the fullest one's memory counts."""
    memory = torch.tensor(peak_memory_gib(trainer.device), device=trainer.device)
    dist.all_reduce(memory, op=dist.ReduceOp.MAX)
    reset_peak_memory(trainer.device)
    row = meter.row(trainer.state.step, result.loss, result.grad_norm, learning_rate, memory.item())
    for sink in sinks:
        sink.write(row)
