"""Float8 matrix products through torchao, and float8 weights under FSDP.

Linear layers are exchanged for torchao's, which cast what they multiply. With one scale a tensor (`tensorwise`) a
weight can be cast before FSDP gathers it, a quarter of float32's bytes and half of bfloat16's: `gather_in_float8`. Its
scale needs the largest element of all ranks, which is one exchange for each weight at each gathering, or one for all
weights after each step: `Float8Gather.compute_scales`.

torchao puts a tensor subclass in the place of such a parameter, which then everything that touches parameters has to
know. Here they stay plain tensors: the two functions that FSDP2 looks for in a shard are attached to it, and lend the
shard to torchao's subclass for as long as a gathering takes.

Source:
    torchao, https://github.com/pytorch/ao/tree/main/torchao/float8; FP8 formats, https://arxiv.org/abs/2209.05433.
"""

from __future__ import annotations

import itertools
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from titan.config.schema import Float8Config, Float8Recipe
from titan.errors import ConfigError, Problem
from titan.models.decoder import Decoder
from titan.models.family import Cut

_MULTIPLE = 16
"""Float8 products need sizes that are multiples of this, on every rank."""
_OLDEST = (8, 9)
"""The first compute capability with float8 units."""


@dataclass(frozen=True)
class Float8Result:
    """What was exchanged."""

    converted: list[str]
    skipped: dict[str, str]
    """Linears left as they were, and why."""

    def describe(self, config: Float8Config) -> list[str]:
        """Return lines for the log: how many were exchanged, and every other one with the reason."""
        line = f"float8 {config.recipe.name} on {_count(self.converted)}"
        names = [*self.converted, *self.skipped]
        unmatched = [part for part in config.filter_fqns if not any(part in name for name in names)]
        lines = [f"float8.filter_fqns has {part}, which names no linear here" for part in unmatched]
        return [line, *(f"float8 leaves {group}" for group in group_names(self.skipped)), *lines]


def check_float8_units(config: Float8Config, device: torch.device) -> None:
    """See that a device can do what a config asks of it.

    Raises:
        ConfigError: If the device has no float8 units and emulation is off.
    """
    if config.recipe is Float8Recipe.none or config.emulate:
        return
    if device.type != "cuda":
        has = f"{device.type} has none"
    elif torch.cuda.get_device_capability(device) < _OLDEST:
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        has = f"{torch.cuda.get_device_name(device)} has compute capability {capability}, they came with 8.9"
    else:
        return
    raise ConfigError(
        [Problem(f"float8={config.recipe.name} needs float8 units", has, "float8=none   or  float8.emulate=true")]
    )


def apply_float8(
    model: nn.Module,
    config: Float8Config,
    device: torch.device,
    cut_of: Callable[[str], Cut | None] = lambda name: None,
    tp: int = 1,
) -> Float8Result:
    """Exchange linear layers for float8 ones, in place, before anything else is applied.

    The projection to words is none of them unless the config asks: its error goes straight into the loss.

    Args:
        model: Whole, as a single process has it.
        config: Which, and how.
        device: What will compute.
        cut_of: What tensor parallelism will do with a module, by its name.
        tp: Over how many ranks.

    Raises:
        ConfigError: If the device has no float8 units and emulation is off.
    """
    check_float8_units(config, device)
    torchao = _torchao()
    float8_config = replace(torchao.Float8LinearConfig.from_recipe_name(config.recipe.name), emulate=config.emulate)
    is_fast = torchao._auto_filter_for_recipe(config.recipe.name, []) if config.auto_filter_small_kn else None
    skipped: dict[str, str] = {}
    converted: list[str] = []

    def chosen(module: nn.Module, name: str) -> bool:
        if not isinstance(module, nn.Linear):
            return False
        reason = _reason_to_skip(name, _local_sizes(module, cut_of(name), tp), config, is_fast)
        if reason:
            skipped[name] = reason
        else:
            converted.append(name)
        return not reason

    torchao.convert_to_float8_training(model, module_filter_fn=chosen, config=float8_config)
    return Float8Result(converted, skipped)


def projection_of(output: nn.Module) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return how a float8 output multiplies, for `titan.parallel.loss`; None for any other output."""
    layers = _torchao().float8_linear
    if not isinstance(output, layers.Float8Linear):
        return None
    multiply, settings = layers.matmul_with_hp_or_float8_args.apply, (output.linear_mm_config, output.config)

    def project(hidden: Tensor, weight: Tensor) -> Tensor:
        return multiply(hidden, weight.t(), *settings)

    return project


@dataclass
class _Float8Shard:
    """A rank's shard of a weight that is gathered in float8. FSDP calls `before_gather` and `after_gather`."""

    name: str
    parameter: DTensor
    linear: Any
    """torchao's Float8Linear that multiplies by it."""
    scale: Tensor | None = None
    """By which the whole weight is multiplied before it is cast; None computes it at every gathering."""

    @property
    def local(self) -> Tensor:
        """This rank's part: the very tensor that FSDP asks."""
        return self.parameter._local_tensor

    def attach(self) -> None:
        local: Any = self.local
        local.fsdp_pre_all_gather, local.fsdp_post_all_gather = self.before_gather, self.after_gather

    def before_gather(self, mesh: DeviceMesh) -> tuple[Any, Any]:
        return self._lent().fsdp_pre_all_gather(mesh)

    def after_gather(self, gathered: Any, metadata: Any, dtype: torch.dtype, *, out: Tensor | None = None) -> Any:
        return self._lent().fsdp_post_all_gather(gathered, metadata, dtype, out=out)

    def _lent(self) -> Any:
        from torchao.float8.fsdp_utils import WeightWithDynamicFloat8CastTensor

        dtype = self.linear.config.cast_config_weight.target_dtype
        return WeightWithDynamicFloat8CastTensor(self.local, self.linear.linear_mm_config, dtype, self.scale)


@dataclass
class Float8Gather:
    """The weights of a rank's model that are gathered in float8."""

    shards: list[_Float8Shard] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    """Float8 linears whose weights are gathered as all others are, because the ranks have unequal shards of them."""
    group: dist.ProcessGroup | None = None
    """The ranks that share each weight."""

    @torch.no_grad()
    def compute_scales(self) -> None:
        """Compute all scales, with one exchange; to be called whenever the weights have changed.

        They are the scales, to the bit, that each gathering would compute by itself.
        """
        if not self.shards:
            return
        from torchao.float8.float8_utils import amax_to_scale

        largest = torch.stack(torch._foreach_norm([shard.local for shard in self.shards], math.inf))
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        scales = amax_to_scale(largest, self.shards[0].linear.config.cast_config_weight.target_dtype)
        for shard, scale in zip(self.shards, scales.unbind(), strict=True):
            shard.scale = scale

    def describe(self, has_scales: bool) -> list[str]:
        """Return lines for the log."""
        scales = ", all scales in one exchange after each step" * has_scales
        lines = [f"float8 weights gathered in float8: {_count([shard.name for shard in self.shards])}{scales}"]
        reasons = dict.fromkeys(self.others, "the ranks have unequal shards of its rows")
        return lines + [f"float8 gathers in high precision {group}" for group in group_names(reasons)]


def gather_in_float8(parts: Sequence[Decoder], group: dist.ProcessGroup) -> Float8Gather:
    """Let FSDP gather the weights of float8 linears in float8, from now on.

    Args:
        parts: This rank's stages of the model, or all of it: FSDP applied, in memory, not yet run.
        group: The ranks over which FSDP shards.
    """
    float8_linear = _torchao().float8_linear.Float8Linear
    found = Float8Gather(group=group)
    for part in parts:
        tied = part.tok_embeddings.weight if part.config.tie_embeddings and part.tok_embeddings is not None else None
        for name, module in part.named_modules():
            # of one that is also the embedding's, words are looked up
            if not isinstance(module, float8_linear) or module.weight is tied:
                continue
            name = name.replace("_checkpoint_wrapped_module.", "")
            weight = module.weight
            assert isinstance(weight, DTensor), "FSDP is applied"
            placed = zip(weight.placements, weight.device_mesh.shape, strict=True)
            parts_of_rows = math.prod(size for placement, size in placed if getattr(placement, "dim", None) == 0)
            if weight.shape[0] % parts_of_rows:
                found.others.append(name)
            else:
                found.shards.append(_Float8Shard(name, weight, module))
    for shard in found.shards:
        shard.attach()
    return found


def group_names(reasons: dict[str, str]) -> list[str]:
    """Return modules with what is said of each, those of the blocks together: `layers.0-3.attention.wk, wv (8): ...`.

    Args:
        reasons: By the names of the modules.
    """
    blocks: dict[tuple[str, str, str], list[int]] = {}
    for name, reason in reasons.items():
        parent, _, leaf = name.rpartition(".")
        parts = parent.split(".")
        index = next((int(part) for part in parts if part.isdigit()), -1)
        pattern = ".".join("*" if part.isdigit() else part for part in parts)
        blocks.setdefault((reason, pattern, leaf), []).append(index)
    together: dict[tuple[str, str, str], list[str]] = {}
    for (reason, pattern, leaf), indices in blocks.items():
        where = pattern.replace("*", ",".join(_ranges(indices)))
        together.setdefault((reason, where, f"{len(indices)} x " * (len(indices) > 1)), []).append(leaf)
    lines = []
    for (reason, where, times), leaves in together.items():
        name = f"{where}.{', '.join(leaves)}" if where else ", ".join(leaves)
        is_one = not times and len(leaves) == 1
        lines.append(f"{name}{'' if is_one else f' ({times}{len(leaves)} linears)'}: {reason}")
    return lines


def _ranges(indices: Iterable[int]) -> list[str]:
    """Return ascending numbers as text: 0-3, 5."""
    runs = [
        [index for _, index in run]
        for _, run in itertools.groupby(enumerate(sorted(indices)), lambda at: at[1] - at[0])
    ]
    return [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} linear{'s' * (len(names) != 1)}"


def _local_sizes(module: nn.Linear, cut: Cut | None, tp: int) -> tuple[int, int]:
    """Return inputs and outputs of what a rank multiplies by."""
    rows = module.out_features // tp if cut in (Cut.rows, Cut.output) else module.out_features
    columns = module.in_features // tp if cut is Cut.columns else module.in_features
    return columns, rows


def _reason_to_skip(
    name: str, sizes: tuple[int, int], config: Float8Config, is_fast: Callable[[nn.Module, str], bool] | None
) -> str:
    named = [part for part in config.filter_fqns if part in name]
    if named:
        return f"float8.filter_fqns has {named[0]}"
    if name == "output" and not config.convert_output:
        return "float8.convert_output = false"
    columns, rows = sizes
    if columns % _MULTIPLE or rows % _MULTIPLE:
        return f"{columns} x {rows} on a rank is not a multiple of {_MULTIPLE}"
    # torchao's rule takes a linear, and is asked about the size that is multiplied
    if is_fast is not None and not is_fast(nn.Linear(columns, rows, bias=False, device="meta"), name):
        return f"{columns} x {rows} on a rank is faster without: float8.auto_filter_small_kn"
    return ""


def _torchao() -> Any:
    # torchao reports extensions that were built for another PyTorch, none of which training needs
    logging.getLogger("torchao").setLevel(logging.ERROR)
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # of a deprecation in torchao
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torchao.float8
        import torchao.float8.float8_linear
        import torchao.float8.fsdp_utils
    return torchao.float8
