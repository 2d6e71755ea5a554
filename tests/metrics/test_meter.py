"""Rates between two rows: what they count, what they leave out, and when a share of the peak is shown."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
import torch

from titan.metrics import meter as module
from titan.metrics.memory import peak_memory_gib, reset_peak_memory
from titan.metrics.meter import Meter, bits_per_byte, validation_row


@pytest.fixture
def pass_time(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that goes on only when told."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])

    def go_on(seconds: float) -> None:
        now[0] += seconds

    return go_on


def build(**changes) -> Meter:
    """Return a meter for 2 devices, 1,000 tokens a step and a gigaflop a token."""
    arguments = {"tokens_per_step": 1000, "flops_per_token": 10**9, "devices": 2, "peak_tflops": None, **changes}
    meter = Meter(**arguments)
    meter.start_over()
    return meter


def row(meter: Meter, step: int = 10) -> dict:
    """Return a row."""
    return meter.row(step, loss=2.5, grad_norm=0.75, learning_rate=1e-3, memory_gib=1.5)


def test_a_row_has_the_keys_that_tools_rely_on(pass_time: Callable[[float], None]) -> None:
    """Names and order are a contract; the values handed in are handed on unrounded."""
    meter = build()
    meter.steps = 1
    pass_time(1)
    found = row(meter)
    assert list(found) == [
        "step",
        "loss",
        "grad_norm",
        "learning_rate",
        "tokens",
        "tokens_per_second",
        "tokens_per_second_per_device",
        "tflops_per_device",
        "mfu",
        "memory_gib",
        "step_seconds",
        "data_seconds",
        "checkpoint_seconds",
        "time",
    ]
    assert (found["loss"], found["grad_norm"], found["learning_rate"], found["memory_gib"]) == (2.5, 0.75, 1e-3, 1.5)


def test_rates_are_work_by_time(pass_time: Callable[[float], None]) -> None:
    """Five steps in 2 seconds: tokens a second over all and a device, FLOP/s a device, seconds a step."""
    meter = build()
    meter.steps = 5
    pass_time(2)
    found = row(meter)
    assert found["tokens_per_second"] == pytest.approx(2500)
    assert found["tokens_per_second_per_device"] == pytest.approx(1250)
    assert found["tflops_per_device"] == pytest.approx(1.25)
    assert found["step_seconds"] == pytest.approx(0.4)
    assert found["tokens"] == 10_000, "of the whole run, not since the last row"


def test_saving_a_checkpoint_does_not_slow_training_on_paper(pass_time: Callable[[float], None]) -> None:
    """Its seconds are shown by themselves and taken out of the rates; waiting for data is part of them."""
    meter = build()
    meter.steps = 5
    meter.checkpoint_seconds = 3
    meter.data_seconds = 0.5
    pass_time(5)
    found = row(meter)
    assert found["tokens_per_second"] == pytest.approx(2500)
    assert found["checkpoint_seconds"] == 3
    assert found["data_seconds"] == 0.5


def test_every_row_starts_over(pass_time: Callable[[float], None]) -> None:
    """A row tells of the steps since the one before, so a slow start does not linger."""
    meter = build()
    meter.steps, meter.data_seconds, meter.checkpoint_seconds = 1, 9.0, 1.0
    pass_time(100)
    row(meter, 1)
    meter.steps = 10
    pass_time(1)
    found = row(meter, 11)
    assert found["tokens_per_second"] == pytest.approx(10_000)
    assert (found["data_seconds"], found["checkpoint_seconds"]) == (0, 0)


def test_a_share_of_the_peak_needs_a_peak(pass_time: Callable[[float], None]) -> None:
    """With a known peak MFU is the FLOP/s of a device over it; without, there is none."""
    for peak, expected in ((10.0, 0.05), (None, None)):
        meter = build(peak_tflops=peak)
        meter.steps = 1
        pass_time(1)
        assert row(meter)["mfu"] == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(("seconds", "expected"), [(1.0, 1.0), (0.999, None), (0.01, None)])
def test_more_than_the_peak_is_never_shown(
    pass_time: Callable[[float], None], seconds: float, expected: float | None
) -> None:
    """Exactly the peak is shown; a value above 100 % would mean that the peak is wrong, and is left out."""
    meter = build(peak_tflops=0.5)
    meter.steps = 1
    pass_time(seconds)
    assert row(meter)["mfu"] == expected


def test_times_are_iso_8601_in_utc() -> None:
    """The time reads back as now, with its zone."""
    meter = build()
    meter.steps = 1
    written = datetime.fromisoformat(row(meter)["time"])
    assert written.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - written) < timedelta(minutes=1)


def test_bits_a_byte_compare_across_tokenizers() -> None:
    """Uniform guessing among 256 bytes costs 8 bits a byte; with tokens of four bytes the same loss costs a quarter."""
    assert bits_per_byte(math.log(256), tokens=100, text_bytes=100) == pytest.approx(8)
    assert bits_per_byte(math.log(256), tokens=25, text_bytes=100) == pytest.approx(2)
    assert bits_per_byte(1.0, 0, 0) == 0


def test_memory_is_this_processs_peak() -> None:
    """What was held is in the peak, and stays in it after it was given back."""
    cpu = torch.device("cpu")
    before = peak_memory_gib(cpu)
    assert 0.05 < before < 64, "PyTorch alone takes a part of a GiB"
    held = torch.ones(1 << 26)  # a quarter of a GiB
    during = peak_memory_gib(cpu)
    assert held.sum() == 1 << 26
    del held
    reset_peak_memory(cpu)
    assert during >= before
    assert peak_memory_gib(cpu) == pytest.approx(during, abs=0.05)


def test_a_validation_row_says_the_same_in_three_ways() -> None:
    """Two tokens of probability 1/8 each, for three bytes: perplexity 8, six bits over three bytes."""
    found = validation_row(7, math.log(8), tokens=2, text_bytes=3, seconds=0.5)
    assert found.pop("time")
    assert found == {
        "step": 7,
        "validation_loss": math.log(8),
        "validation_perplexity": pytest.approx(8),
        "validation_bits_per_byte": pytest.approx(2),
        "validation_tokens": 2,
        "validation_seconds": 0.5,
    }


@pytest.mark.parametrize(("loss", "shown"), [(math.nan, None), (math.inf, None), (800.0, 800.0)])
def test_what_json_cannot_say_is_null(loss: float, shown: float | None) -> None:
    """A perplexity beyond the largest number is null too, beside a loss that is not."""
    found = validation_row(7, loss, tokens=2, text_bytes=3, seconds=0.5)
    assert (found["validation_loss"], found["validation_perplexity"]) == (shown, None)
