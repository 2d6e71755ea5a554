"""The FLOP formula against PyTorch's own count, and the table of peaks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.models.flavors import FLAVORS, build_model, flavor, random_tokens, shrink
from titan.config.schema import Dtype
from titan.models import linear
from titan.models.flops import PEAK_TFLOPS, count_matrix_parameters, count_parameters, flops_per_token, peak_tflops


@pytest.mark.parametrize("name", FLAVORS)
@pytest.mark.parametrize("seq_len", [32, 80])
def test_the_formula_is_what_pytorch_counts(monkeypatch: pytest.MonkeyPatch, name: str, seq_len: int) -> None:
    """Counted operator by operator, attention over the whole square, forward and backward make the formula exactly."""
    monkeypatch.setattr(linear, "_PREFERS_ONEDNN", False)  # the counter knows PyTorch's own products only
    config = shrink(flavor(name))
    model = build_model(config, seq_len)
    tokens = random_tokens(config, 2, seq_len)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    assert counter.get_total_flops() == flops_per_token(config, seq_len) * tokens.numel()


def test_the_8b_model_needs_what_others_report() -> None:
    """For Llama 3 8B at 8,192 tokens: 6 times its parameters without the embedding, and attention."""
    config = flavor("llama3_8b")
    without_embedding = 8_030_261_248 - 128_256 * 4096
    expected = 6 * (without_embedding - 65 * 4096) + 12 * 32 * 32 * 128 * 8192
    assert flops_per_token(config, 8192) == expected
    assert expected == pytest.approx(57.9e9, rel=0.01)


def test_a_tied_projection_is_computed_but_not_stored_twice() -> None:
    """Tying changes the number of parameters and no operation."""
    config = flavor("llama3_2_1b")
    untied = replace(config, tie_embeddings=False)
    assert count_matrix_parameters(config) == count_matrix_parameters(untied)
    assert count_parameters(untied) - count_parameters(config) == config.vocab_size * config.dim


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA GH200 480GB", 989.0),
        ("NVIDIA H20", 148.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA L40S", 362.0),
        ("AMD Instinct MI300X", 1300.0),
        ("NVIDIA RTX A1000 Laptop GPU", None),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("AMD EPYC 9B14 96-Core Processor", None),
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", None),
        ("", None),
    ],
)
def test_a_peak_is_known_by_the_name_of_the_device(device: str, expected: float | None) -> None:
    """PyTorch's device names find their own peak; a name that only resembles another finds none."""
    assert peak_tflops(device, Dtype.bfloat16) == expected


@pytest.mark.parametrize("device", PEAK_TFLOPS)
def test_no_peak_is_claimed_for_float32(device: str) -> None:
    """What float32 reaches depends on settings, so no share of a peak is shown for it."""
    assert peak_tflops(device, Dtype.float32) is None
