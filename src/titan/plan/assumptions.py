"""What a plan takes for granted, each with where it is from. All are on the screen beside every plan.

Two of them are measured: `matmul_efficiency` and `memory_overhead`. As they stand here they are fitted to one row that
TorchTitan has published (`titan.plan.published`: the first), and `--calibrate` fits them to a run of yours. The others
are stated, not fitted, and the same for every model, layout and number of devices.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class Assumptions:
    """Shares of what the data sheets say, and what lies outside of the count."""

    matmul_efficiency: float = 0.535
    """Share of the peak that large bfloat16 products reach while all else goes on; fitted to the first published
    row."""
    memory_overhead: float = 1.132
    """What the allocator reserves over what is counted, for memory comes in pieces; fitted to the first published
    row."""
    attention_efficiency: float = 0.47
    """FlashAttention 2 forward, as a share of what products reach: 35 % of an H100's peak (FlashAttention-3,
    https://arxiv.org/abs/2407.08608, abstract) over the 75 % that is taken for a product alone."""
    hopper_attention_efficiency: float = 0.8
    """The same for kernels made for Hopper (cuDNN's, FlashAttention 3): 1.5 to 2 times FlashAttention 2 (same
    abstract); not held against a run."""
    attention_backward_efficiency: float = 0.8
    """Attention's backward pass beside its forward pass, at an equal number of operations."""
    float8_efficiency: float = 0.9
    """Share of float8's peak (twice bfloat16's) beside bfloat16's share of its own; casts are counted apart."""
    rowwise_efficiency: float = 0.7
    """The same with one scale a row."""
    memory_bandwidth_efficiency: float = 0.8
    """Share of the memory's bandwidth that norms, activations and casts reach."""
    node_efficiency: float = 0.75
    """Share of the bandwidth inside a node that a collective reaches."""
    network_efficiency: float = 0.8
    """Share of the bandwidth between nodes that a collective reaches."""
    overlap: float = 0.9
    """Share of a block's computation behind which the gathering of another block's weights hides."""
    async_tp_hidden: float = 0.5
    """Share of tensor parallelism's exchanges that parallelism.async_tp hides."""
    latency_seconds: float = 2e-5
    """What a collective takes however little it moves."""
    kernel_seconds: float = 6e-6
    """What the host takes to hand out an operation that is not compiled; a device that is faster waits for it."""
    outside_gib: float = 2.0
    """Memory of a GPU that is not PyTorch's: the CUDA context, NCCL's buffers, libraries."""

    def describe(self) -> list[tuple[str, float]]:
        """Return names and values, in order."""
        return [(field.name, getattr(self, field.name)) for field in fields(self)]


@dataclass(frozen=True)
class System:
    """Where programs differ in what they keep and move, for the same layout."""

    name: str
    loss_bytes: int = 12
    """Bytes a logit at the peak of a loss of all logits at once: the softmax and two gradients, in float32."""
    parallel_loss_bytes: int = 10
    """The same where every rank has some of the words: the product, its copy in float32, the gradient."""
    norm_passes: int = 2
    """How often an RMSNorm that is not compiled reads or writes its input, in units of two bytes a number."""
    rope_passes: int = 28
    """The same for rotary positions."""
    gathers_float8: bool = False
    """Whether tensor parallelism casts what it gathers to float8 first."""
    keeps_logits: bool = False
    """Whether the last stage keeps the logits of all microbatches of a pipeline until the step's end."""


TITAN = System("titan")
TORCHTITAN_2024 = System(
    "torchtitan of December 2024",
    parallel_loss_bytes=18,
    norm_passes=18,
    rope_passes=10,
    gathers_float8=True,
    keeps_logits=True,
)
"""Its DTensor loss keeps the product and makes the shifted logits, their exponentials and two gradients anew; RMSNorm
was not one kernel yet; its float8 plans cast before they gather; PyTorch's stages kept every output."""
TORCHTITAN_2025 = replace(TORCHTITAN_2024, name="torchtitan of June 2025", loss_bytes=4)
"""It compiled the loss: the product and its gradient, in bfloat16, are all there is of the logits."""
