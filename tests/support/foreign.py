"""Small models in the formats of others, made by the transformers library or written as Meta writes them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from tests.reference.hugging_face import to_hugging_face_config
from titan.config.schema import ModelConfig, RopeScalingConfig

SMALL = ModelConfig(
    name="small",
    dim=48,
    n_layers=3,
    n_heads=6,
    n_kv_heads=2,
    ffn_dim=80,
    vocab_size=70,
    max_seq_len=512,
    norm_eps=1e-6,
    rope_theta=10000.0,
)
SCALING = RopeScalingConfig(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_seq_len=64)


def shape(**changes: object) -> ModelConfig:
    """Return `SMALL` with other values."""
    return ModelConfig(**{**vars(SMALL), **changes})  # type: ignore[arg-type]


def save_hugging_face(
    folder: Path, config: ModelConfig = SMALL, shard_bytes: int | str = "5GB", dtype: torch.dtype = torch.float32
) -> LlamaForCausalLM:
    """Have transformers write a model with random weights, and return it."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(to_hugging_face_config(config)).eval()
    for parameter in model.parameters():  # norms too, which are ones otherwise
        torch.nn.init.normal_(parameter, mean=0.1 if parameter.ndim == 1 else 0.0, std=0.1)
    model = model.to(dtype)
    model.save_pretrained(folder, max_shard_size=shard_bytes)
    return model
