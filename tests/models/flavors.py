"""The published flavors, and each of them shrunk to what a test can afford."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from tests.support.configs import compose
from titan.config.load import conf_dir
from titan.config.schema import ModelConfig
from titan.models.llama import Llama

PARAMETERS = {
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "llama3_1_8b": 8_030_261_248,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_405b": 405_853_388_800,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
}
"""As published by Meta."""

FLAVORS = sorted(file.stem for file in (conf_dir() / "model").glob("*.yaml"))
HEAD_SIZE = 16
ORIGINAL_SEQ_LEN = 64


def flavor(name: str) -> ModelConfig:
    """Return the model of a config group's option."""
    return compose([f"model={name}"]).model


def shrink(config: ModelConfig) -> ModelConfig:
    """Keep what makes a flavor itself at a size for a test.

    Kept are the query heads of each kv head, the ratio of the feed-forward width, the rotary base and the factors of
    its scaling, tied or untied embeddings, and the norm's epsilon. The length that the scaling starts from is so
    short that a sequence of three times as many tokens sees frequencies that are kept, blended and slowed.
    """
    group = config.n_heads // config.n_kv_heads
    kv_heads = {1: 4, 3: 2, 4: 2}.get(group, 1)
    dim = kv_heads * group * HEAD_SIZE
    scaling = config.rope_scaling
    return replace(
        config,
        dim=dim,
        n_layers=3,
        n_heads=kv_heads * group,
        n_kv_heads=kv_heads,
        ffn_dim=8 * round(dim * config.ffn_dim / config.dim / 8),
        vocab_size=211,
        rope_scaling=None if scaling is None else replace(scaling, original_seq_len=ORIGINAL_SEQ_LEN),
    )


def build_model(config: ModelConfig, seq_len: int, seed: int = 0) -> Llama:
    """Return a model with weights so large that its logits are of the order of 1, and norms that are not all ones."""
    generator = torch.Generator().manual_seed(seed)
    model = Llama(config, seq_len)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
            else:
                std = 1.0 if name.startswith("tok_embeddings") and not config.tie_embeddings else config.dim**-0.5
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    model.init_buffers("cpu")
    return model


def random_tokens(config: ModelConfig, rows: int, seq_len: int) -> torch.Tensor:
    """Return tokens, always the same. Shape: (rows, seq_len)."""
    return torch.randint(config.vocab_size, (rows, seq_len), generator=torch.Generator().manual_seed(1))


def count(module: nn.Module) -> int:
    """Return how many numbers a module's parameters hold; a shared one counts once."""
    return sum(parameter.numel() for parameter in module.parameters())
