"""What one rank has of the model: its stages, the shapes of its weights, the numbers of its shards.

The fullest rank counts. Along `fsdp` that is the first, which has the rounded-up share of every weight's rows, as
`torch.chunk` cuts them; along `tp` all have the same; along `pp` it depends, so every rank of it is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from titan.config.degrees import pipeline_microbatches, plan_stages, stages_of_ranks
from titan.config.schema import Dtype, Float8Recipe, ParallelismConfig, TitanConfig

MATRICES = ("wq", "wk", "wv", "wo", "w1", "w3", "w2")
_PARENT = {name: "attention" if name in ("wq", "wk", "wv", "wo") else "feed_forward" for name in MATRICES}
_MULTIPLE = 16


@dataclass(frozen=True)
class Stage:
    """Modules that follow each other on one rank."""

    blocks: tuple[int, ...]
    has_embedding: bool
    has_output: bool


@dataclass(frozen=True)
class Shapes:
    """Sizes that every formula needs, of a resolved config: what a tensor-parallel rank has, before FSDP."""

    config: TitanConfig

    @cached_property
    def fsdp(self) -> int:
        """Ranks that share out each weight."""
        return self.config.parallelism.dp_shard * self.config.parallelism.cp

    @cached_property
    def bytes(self) -> int:
        """Of a number in forward and backward."""
        return 4 if self.config.training.param_dtype is Dtype.float32 else 2

    @cached_property
    def reduce_bytes(self) -> int:
        """Of a number of a gradient that is summed over ranks."""
        return 2 if self.config.training.reduce_dtype is Dtype.bfloat16 else 4

    @cached_property
    def moment_bytes(self) -> int:
        """Of a number of a moment."""
        return 2 if self.config.optimizer.state_dtype is Dtype.bfloat16 else 4

    @cached_property
    def has_sequence_parallel(self) -> bool:
        """Whether what lies between the matrices is cut along the sequence."""
        return self.config.parallelism.tp > 1 and self.config.parallelism.sequence_parallel

    @cached_property
    def between(self) -> float:
        """The share of a residual stream that a rank has between the matrices."""
        return 1 / self.config.parallelism.tp if self.has_sequence_parallel else 1.0

    @cached_property
    def kv_dim(self) -> int:
        """Numbers of all keys of a position."""
        model = self.config.model
        return model.n_kv_heads * (model.dim // model.n_heads)

    @cached_property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of a block's matrices on a tensor-parallel rank."""
        model, tp = self.config.model, self.config.parallelism.tp
        dim, ffn = model.dim, model.ffn_dim
        return {
            "wq": (dim // tp, dim),
            "wk": (self.kv_dim // tp, dim),
            "wv": (self.kv_dim // tp, dim),
            "wo": (dim, dim // tp),
            "w1": (ffn // tp, dim),
            "w3": (ffn // tp, dim),
            "w2": (dim, ffn // tp),
        }

    @cached_property
    def words(self) -> int:
        """Rows of the embedding, or of the output, on a tensor-parallel rank."""
        return self.config.model.vocab_size // self.config.parallelism.tp

    @cached_property
    def block_numbers(self) -> int:
        """Parameters of a block on a tensor-parallel rank, all shards together."""
        return sum(map(math.prod, self.matrices.values())) + 2 * self.config.model.dim

    @cached_property
    def float8_share(self) -> float:
        """The share of the blocks' matrices that is multiplied in float8, by their numbers."""
        settings = self.config.float8
        if settings.recipe is Float8Recipe.none:
            return 0.0
        fit = {name: size for name, size in self.matrices.items() if not any(n % _MULTIPLE for n in size)}
        total, layers = sum(map(math.prod, self.matrices.values())), self.config.model.n_layers
        if not settings.filter_fqns:
            return sum(map(math.prod, fit.values())) / total
        chosen = sum(
            math.prod(size)
            for layer in range(layers)
            for name, size in fit.items()
            if not any(part in f"layers.{layer}.{_PARENT[name]}.{name}" for part in settings.filter_fqns)
        )
        return chosen / (total * layers)

    @cached_property
    def gathered_bytes(self) -> float:
        """Of a block's number when FSDP gathers it, on the average."""
        share = self.float8_share if self.config.float8.fsdp_all_gather else 0.0
        return self.bytes * (1 - share) + share

    @cached_property
    def shard_of_block(self) -> int:
        """Numbers of a block in the first rank's shards."""
        rows = [*self.matrices.values(), *[(self.config.model.dim, 1)] * 2]
        return sum(-(-height // self.fsdp) * width for height, width in rows)

    @cached_property
    def shard_of_words(self) -> int:
        """Numbers of the embedding, or of the output, in the first rank's shards."""
        return -(-self.words // self.fsdp) * self.config.model.dim

    @cached_property
    def microbatch_rows(self) -> int:
        """Rows that flow through the model at once."""
        config = self.config
        pieces = pipeline_microbatches(config) if config.parallelism.pp > 1 else 1
        return config.training.local_batch_size // pieces

    @cached_property
    def tokens(self) -> int:
        """Tokens of a microbatch on a rank, before tensor parallelism."""
        return self.microbatch_rows * self.config.training.seq_len // self.config.parallelism.cp

    def shard_numbers(self, stages: tuple[Stage, ...]) -> int:
        """Return the parameters of the first shard of some stages; what is tied counts once on a rank of its own."""
        return sum(self._shard_of_stage(stage) for stage in stages)

    def whole_numbers(self, stage: Stage) -> int:
        """Return the parameters of a stage on a tensor-parallel rank, all shards together."""
        model = self.config.model
        ends = stage.has_embedding + stage.has_output - self._is_shared(stage)
        return len(stage.blocks) * self.block_numbers + ends * self.words * model.dim + stage.has_output * model.dim

    def _is_shared(self, stage: Stage) -> bool:
        return self.config.model.tie_embeddings and stage.has_embedding and stage.has_output

    def _shard_of_stage(self, stage: Stage) -> int:
        ends = stage.has_embedding + stage.has_output - self._is_shared(stage)
        norm = -(-self.config.model.dim // self.fsdp) if stage.has_output else 0
        return len(stage.blocks) * self.shard_of_block + ends * self.shard_of_words + norm


def stages_of(config: TitanConfig) -> tuple[tuple[Stage, ...], ...]:
    """Return the stages of every pipeline rank."""
    settings, layers = config.parallelism, config.model.n_layers
    if settings.pp == 1:
        return ((Stage(tuple(range(layers)), True, True),),)
    modules = settings.pp_modules
    if modules is not None or settings.pp_schedule_csv is not None:
        return _build_stages(layers, settings, modules)
    key = (settings.pp, settings.pp_schedule.name, settings.pp_stages_per_rank)
    key = (layers, *key, settings.pp_less_first, settings.pp_less_last)
    if key not in _built:  # a search asks again and again
        _built[key] = _build_stages(layers, settings, None)
    return _built[key]


_built: dict[tuple[object, ...], tuple[tuple[Stage, ...], ...]] = {}


def _build_stages(
    layers: int, settings: ParallelismConfig, modules: list[list[str]] | None
) -> tuple[tuple[Stage, ...], ...]:
    ranks = stages_of_ranks(settings)
    count = sum(map(len, ranks))
    stages = list(_read_plan(modules or plan_stages(layers, count, settings.pp_less_first, settings.pp_less_last)))
    return tuple(tuple(stages[index] for index in own) for own in ranks)


def _read_plan(plan: list[list[str]]) -> Iterator[Stage]:
    for modules in plan:
        blocks = tuple(int(name.removeprefix("layers.")) for name in modules if name.startswith("layers."))
        yield Stage(blocks, "tok_embeddings" in modules, "output" in modules)
