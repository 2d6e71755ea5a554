"""The frame that every family of models shares.

Nothing here knows of ranks: parallelism is applied from outside (`titan.parallel.apply`). Two habits keep that
possible. Blocks live in a ModuleDict keyed by their index, so that a pipeline stage that owns blocks 8 to 15 keeps
their names; and the embedding, the last norm and the output may be None, in a stage that does not own them.

Shape letters: B batch, S sequence, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from titan.config.schema import ModelConfig
from titan.models.attention import CausalAttention
from titan.models.linear import Linear
from titan.models.rope import build_rope_cache


class Decoder(nn.Module):
    """Embedding, blocks, norm and output: tokens in, logits out.

    What titan relies on in every family: the four parts by these names, of which a pipeline stage has some and None
    for the others; `positions`, which context parallelism sets; and that a position is mixed with others nowhere but
    in a `CausalAttention`, which context parallelism exchanges.

    Args:
        config: The shape.
        seq_len: Positions to prepare rotary angles for; the longest sequence that `forward` will see.
        block: Makes one block; its forward takes hidden states, rotary angles, and what `CausalAttention` takes as
            `visible`.
    """

    rope: Tensor

    def __init__(self, config: ModelConfig, seq_len: int, block: Callable[[ModelConfig], nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.seq_len = seq_len
        self.tok_embeddings: nn.Module | None = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleDict({str(i): block(config) for i in range(config.n_layers)})
        self.norm: nn.Module | None = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.output: nn.Module | None = Linear(config.dim, config.vocab_size)
        self.register_buffer("rope", torch.empty(seq_len, 0, 2), persistent=False)
        self.positions: Tensor | None = None
        """Where the tokens that `forward` gets stand in their row, if not at 0, 1, 2, ...: (S,) or (B, S), int64."""
        self.loss: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None
        """From output, normed hidden states and labels to the sum of losses: `titan.parallel.loss`."""
        self.leaves_output = False
        """Whether `forward` ends before the output, as in a pipeline, whose schedule asks for the loss by itself."""
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the output projection share the embedding's weights, where the config says so.

        NOTE: to be repeated after anything that replaces parameters one by one, such as `to_empty`.
        """
        if self.config.tie_embeddings and self.tok_embeddings is not None and self.output is not None:
            # by the parameter's name, for asked by attribute the embedding may give its weight in another format
            self.output.register_parameter("weight", dict(self.tok_embeddings.named_parameters())["weight"])

    def init_buffers(self, device: torch.device | str) -> None:
        """Compute the rotary angles, and what attention keeps; a model built on meta has none."""
        self.rope = build_rope_cache(self.config, self.seq_len, device)
        for module in self.modules():
            if isinstance(module, CausalAttention):
                module.init_buffers(self.seq_len, device)
        if self.positions is not None:
            self.positions = self.positions.to(device)

    def forward(self, tokens: Tensor, starts: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Predict the next token at every position.

        Args:
            tokens: Token ids; in a pipeline stage without the embedding, the hidden states of the stage before.
            starts: Where in its row the document of each token begins. Attention then stays inside documents and
                positions count from their beginnings. None takes each row for one document.
            labels: The next tokens, for their loss instead of the logits: the sum of cross-entropies, in nats.

        Shape:
            tokens: (B, S) int64, or (B, S, D). starts, labels: (B, S) int64. Returns (B, S, V); (B, S, D) from a stage
            without the output; () with labels.
        """
        positions, visible = self.positions, None
        if starts is not None:
            if positions is None:
                positions = torch.arange(starts.shape[1], device=starts.device)
            attention = next((module for module in self.modules() if isinstance(module, CausalAttention)), None)
            visible = attention.visible(starts, positions) if attention is not None else None
            positions = positions - starts
        x = self.tok_embeddings(tokens) if self.tok_embeddings is not None else tokens
        if positions is not None:
            rope = self.rope[positions]
        else:  # hidden states may be cut along the sequence, tokens never are
            rope = self.rope[: tokens.shape[1]] if self.tok_embeddings is not None else self.rope
        for block in self.layers.values():
            x = block(x, rope, visible)
        x = self.norm(x) if self.norm is not None else x
        if self.output is None or self.leaves_output:
            return x
        return self.output(x) if labels is None else self.loss_of(x, labels)

    def loss_of(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of cross-entropies, in nats, of what `forward` has left. Shape: (B, S, D), (B, S) -> ()."""
        assert self.output is not None
        assert self.loss is not None, "set when parallelism is applied"
        return self.loss(self.output, hidden, labels)
