"""The advice on the console: said when it matters, with what to type, and rarely."""

from __future__ import annotations

from typing import Any

import pytest

from tests.metrics.test_guarded import warnings  # noqa: F401  # a fixture
from tests.support.configs import compose
from titan.metrics.advice import Advice

USUAL = {"loss": 2.0, "grad_norm": 1.0, "memory_gib": 10.0, "step_seconds": 3.0, "tokens_per_second": 1000.0}


class Run:
    """Rows of one run, ten steps apart, each with half a minute of training."""

    def __init__(self, *overrides: str, memory_gib: float | None = 80.0) -> None:
        self.now, self.steps = 0.0, 0
        self.advice = Advice(compose(["run.dir=x", *overrides]), memory_gib, lambda: self.now)

    def log(self, count: int = 1, **values: float) -> None:
        """Log so many rows with these values instead of the usual ones."""
        for _ in range(count):
            self.steps += 10
            self.now += 30
            row: dict[str, Any] = {"step": self.steps, "data_seconds": 0.1, **USUAL, **values}
            self.advice.write(row)


def test_a_usual_run_is_told_nothing(warnings: list[str]) -> None:  # noqa: F811
    """Noise of loss and speed, full as it usually is, is no news."""
    run = Run()
    for index in range(60):
        run.log(loss=2.0 + 0.02 * (index % 3), tokens_per_second=1000.0 - 50 * (index % 2), memory_gib=70.0)
    run.advice.write({"step": run.steps, "validation_loss": 9.0})
    assert warnings == []


@pytest.mark.parametrize(
    ("overrides", "values", "said"),
    [
        (["data.num_workers=1"], {"data_seconds": 6.0}, ["20% of the time", "data.num_workers=3   (is 1)"]),
        ([], {"tokens_per_second": 600.0}, ["600 tok/s, where this run has had 1,000", "profiling=trace"]),
        (
            ["training.local_batch_size=4"],
            {"memory_gib": 78.0},
            [
                "78.0 of the device's 80.0 GiB",
                "activation_checkpoint=selective   or  training.local_batch_size=2",
            ],
        ),
        ([], {"loss": 3.0, "grad_norm": 8.0}, ["jumped to 3.000, from about 2.000", "spike_grad_norm=4"]),
    ],
    ids=["data", "rate", "memory", "loss"],
)
def test_what_matters_is_said_with_what_to_do_about_it(
    overrides: list[str],
    values: dict[str, float],
    said: list[str],
    warnings: list[str],  # noqa: F811
) -> None:
    """Each is said at the step where it shows, with the numbers and the keys, and again only much later."""
    run = Run(*overrides)
    run.log(25)
    assert warnings == []
    run.log(**values)
    assert len(warnings) == 1
    assert warnings[0].startswith("step 260: ")
    assert all(text in warnings[0] for text in said)
    run.log(10, **values)
    assert len(warnings) == 1
    run.now += 3600
    run.log(25)
    run.log(**values)
    assert len(warnings) == 2


def test_one_slow_step_and_a_short_run_are_no_news(warnings: list[str]) -> None:  # noqa: F811
    """Speed is judged over half a minute, and not before there is something to compare with."""
    run = Run()
    run.log(5, step_seconds=0.01, tokens_per_second=10.0, data_seconds=0.09)
    run.log(3)
    run.log(1, tokens_per_second=10.0)
    assert warnings == []


def test_memory_is_not_judged_where_it_is_not_the_ranks_alone(warnings: list[str]) -> None:  # noqa: F811
    """On a CPU, the machine's memory says nothing about one rank."""
    Run(memory_gib=None).log(30, memory_gib=500.0)
    assert warnings == []
