"""Which sinks a run has: the file and the console always, the others where the config names them.

What needs a package of its own is imported here and nowhere else, and only when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable

from titan.config.schema import TitanConfig
from titan.metrics.advice import Advice
from titan.metrics.sinks import Console, Guarded, JsonLines, Sink
from titan.run_directory import RunDirectory


def open_all(
    config: TitanConfig,
    directory: RunDirectory,
    step: int,
    memory_gib: float | None,
    tokens_to_bytes: Callable[[], tuple[int, int]],
) -> list[Sink]:
    """Return the sinks of a run, for the one rank that writes.

    Args:
        config: Of the run.
        directory: Of the run.
        step: The one that it goes on from; what was written beyond it is taken back where that can be done.
        memory_gib: Of the device; None where it is not the rank's alone.
        tokens_to_bytes: Returns how many tokens of the data are how many bytes of text.
    """

    def open_tensorboard() -> Sink:
        from titan.metrics.tensorboard import TensorBoard

        return TensorBoard(directory.tensorboard, step)

    def open_wandb() -> Sink:
        from titan.metrics.wandb import WeightsAndBiases

        return WeightsAndBiases(config, directory)

    steps, settings = config.training.steps, config.metrics
    sinks: list[Sink] = [
        Guarded("metrics.jsonl", lambda: JsonLines(directory.metrics, step)),
        Guarded("the console", lambda: Console(steps, step, tokens_to_bytes)),
        Guarded("advice on the console", lambda: Advice(config, memory_gib)),
    ]
    if settings.tensorboard:
        sinks.append(Guarded("TensorBoard", open_tensorboard))
    if settings.wandb.enable:
        sinks.append(Guarded("Weights & Biases", open_wandb))
    return sinks
