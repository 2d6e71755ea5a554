"""Float8 matrix products through torchao: the linear layers of the blocks are exchanged for float8 ones."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from titan.config.schema import Float8Config, Float8Recipe
from titan.errors import ConfigError, Problem

_MULTIPLE = 16
"""Float8 products need sizes that are multiples of this."""


@dataclass(frozen=True)
class Float8Result:
    """What was exchanged."""

    converted: list[str]
    skipped: dict[str, str]
    """Linears left as they were, and why."""


def apply_float8(model: nn.Module, config: Float8Config, device: torch.device) -> Float8Result:
    """Exchange linear layers for float8 ones, in place, before anything else is applied.

    Raises:
        ConfigError: If the device has no float8 units and emulation is off.
    """
    if not config.emulate and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        raise ConfigError(
            [Problem(f"float8={config.recipe.name} needs float8 units, which {name} lacks", "", "float8=none")]
        )
    convert, float8_config = _torchao(config.recipe)
    skipped: dict[str, str] = {}
    converted: list[str] = []

    def chosen(module: nn.Module, name: str) -> bool:
        if not isinstance(module, nn.Linear):
            return False
        reason = _reason_to_skip(module, name, config.filter_fqns)
        if reason:
            skipped[name] = reason
        else:
            converted.append(name)
        return not reason

    convert(model, module_filter_fn=chosen, config=replace(float8_config, emulate=config.emulate))
    return Float8Result(converted, skipped)


def _reason_to_skip(module: nn.Linear, name: str, filter_fqns: list[str]) -> str:
    named = [part for part in filter_fqns if part in name]
    if named:
        return f"float8.filter_fqns has {named[0]}"
    sizes = (module.in_features, module.out_features)
    if any(size % _MULTIPLE for size in sizes):
        return f"{sizes[0]} x {sizes[1]} is not a multiple of {_MULTIPLE}"
    return ""


def _torchao(recipe: Float8Recipe) -> tuple[Any, Any]:
    # torchao reports extensions that were built for another PyTorch, none of which training needs
    logging.getLogger("torchao").setLevel(logging.ERROR)
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # of a deprecation in torchao
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    return convert_to_float8_training, Float8LinearConfig.from_recipe_name(recipe.name)
