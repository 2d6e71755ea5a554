"""Llama as the transformers library computes it: the oracle for titan's own.

The same weights have other names there, and the rows of the query and key projections another order: Meta's rotary
embedding turns neighbours (0, 1), (2, 3), ... of each head, Hugging Face's turns (0, E/2), (1, E/2 + 1), ...
"""

from __future__ import annotations

from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from titan.config.schema import ModelConfig
from titan.models.llama import LLAMA


def to_hugging_face_config(config: ModelConfig) -> LlamaConfig:
    """Return the same shape as the transformers library describes it."""
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_seq_len,
        }
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=config.ffn_dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie_embeddings,
        rope_parameters=rope,
        attention_bias=False,
        mlp_bias=False,
        attn_implementation="eager",
        use_cache=False,
    )


def to_hugging_face_weights(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Rename and reorder weights, or anything else of their shapes, such as their gradients."""
    out = {}
    for name, tensor in tensors.items():
        heads = config.n_heads if ".wq." in name else config.n_kv_heads if ".wk." in name else None
        if heads is not None:
            tensor = tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        out[LLAMA.hugging_face_name(name)] = tensor
    return out


def build_hugging_face(weights: dict[str, Tensor], config: ModelConfig) -> LlamaForCausalLM:
    """Return transformers' Llama with titan's weights; a tied output projection is the embedding there too."""
    model = LlamaForCausalLM(to_hugging_face_config(config)).to(next(iter(weights.values())).dtype)
    missing, unexpected = model.load_state_dict(to_hugging_face_weights(weights, config), strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= ({"lm_head.weight"} if config.tie_embeddings else set()), missing
    return model
