"""Rotary positions against complex arithmetic written from the papers."""

from __future__ import annotations

import cmath
import math

import pytest
import torch

from tests.models.flavors import FLAVORS, flavor
from titan.config.schema import ModelConfig
from titan.models.rope import apply_rope, build_rope_cache, rope_frequencies


def expected_frequencies(config: ModelConfig) -> list[float]:
    """Return the frequencies in Python's own floats, branch by branch as Llama 3.1's reference does."""
    head_size = config.dim // config.n_heads
    out = []
    for pair in range(head_size // 2):
        frequency = 1.0 / config.rope_theta ** (2 * pair / head_size)
        if (scaling := config.rope_scaling) is not None:
            wavelength = 2 * math.pi / frequency
            if wavelength > scaling.original_seq_len / scaling.low_freq_factor:
                frequency /= scaling.factor
            elif wavelength >= scaling.original_seq_len / scaling.high_freq_factor:
                smooth = (scaling.original_seq_len / wavelength - scaling.low_freq_factor) / (
                    scaling.high_freq_factor - scaling.low_freq_factor
                )
                frequency = (1 - smooth) * frequency / scaling.factor + smooth * frequency
        out.append(frequency)
    return out


@pytest.mark.parametrize("name", FLAVORS)
def test_frequencies_are_those_of_the_reference(name: str) -> None:
    """Every flavor's frequencies, scaled or not, agree to the last digits of float64."""
    config = flavor(name)
    expected = torch.tensor(expected_frequencies(config), dtype=torch.float64)
    torch.testing.assert_close(rope_frequencies(config), expected, rtol=1e-14, atol=0)


def test_scaling_keeps_blends_and_slows() -> None:
    """Llama 3.1's scaling leaves short waves alone, divides long ones by the factor, and goes from one to the other."""
    config = flavor("llama3_1_8b")
    unscaled = config.rope_theta ** -(torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    ratio = unscaled / rope_frequencies(config)
    assert ratio[0] == 1
    assert ratio[-1] == pytest.approx(8)
    assert (ratio.diff() >= -1e-12).all()
    assert ((ratio > 1 + 1e-6) & (ratio < 8 - 1e-6)).any()


@pytest.mark.parametrize("name", ["llama3_1_8b", "llama2_7b"])
def test_turning_equals_multiplication_by_a_complex_number(name: str) -> None:
    """Each pair of neighbours, taken as a complex number, is multiplied by e^(i * position * frequency)."""
    config = flavor(name)
    positions = [0, 1, 5, 1000, config.max_seq_len - 1]
    frequencies = expected_frequencies(config)
    x = torch.randn(1, len(positions), 2, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turns = torch.tensor([[cmath.exp(1j * p * f) for f in frequencies] for p in positions])
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    expected = torch.view_as_real(pairs * turns[:, None]).flatten(-2)

    rope = build_rope_cache(config, config.max_seq_len)[positions]
    turned = apply_rope(x.float(), rope)
    assert (turned - expected).abs().max() < 1e-6


def test_turning_keeps_lengths_and_the_dtype() -> None:
    """A rotation changes no norm, and bfloat16 stays bfloat16 though the angles are float32."""
    config = flavor("llama3_debug")
    x = torch.randn(2, 64, 4, 16, generator=torch.Generator().manual_seed(0))
    rope = build_rope_cache(config, 64)
    torch.testing.assert_close(apply_rope(x, rope).norm(dim=-1), x.norm(dim=-1))
    half = apply_rope(x.bfloat16(), rope)
    assert half.dtype == torch.bfloat16
    exact = apply_rope(x.bfloat16().double(), rope)
    assert (half - exact).abs().max() <= exact.abs().max() * 2**-8


def test_positions_of_each_row_pick_their_angles() -> None:
    """Angles of shape (B, S, E/2, 2) turn each row by its own."""
    config = flavor("llama3_debug")
    rope = build_rope_cache(config, 32)
    x = torch.randn(2, 8, 4, 16, generator=torch.Generator().manual_seed(0))
    positions = torch.stack((torch.arange(8), torch.arange(20, 28)))
    turned = apply_rope(x, rope[positions])
    assert torch.equal(turned[0], apply_rope(x, rope[:8])[0])
    assert torch.equal(turned[1], apply_rope(x, rope[20:28])[1])


def test_far_positions_are_exact() -> None:
    """At position 131,071 cosine and sine are right to float32, which angles held in float32 would not be."""
    config = flavor("llama3_1_8b")
    last = build_rope_cache(config, config.max_seq_len)[-1]
    for pair, frequency in enumerate(expected_frequencies(config)):
        angle = (config.max_seq_len - 1) * frequency
        assert last[pair, 0].item() == pytest.approx(math.cos(angle), abs=1e-7)
        assert last[pair, 1].item() == pytest.approx(math.sin(angle), abs=1e-7)
