"""What titan has to know of a family of models to train it under every parallelism: one description, in one place.

`model.family=llama` is titan's own. A family from outside is any `ModelFamily` that can be imported:
`model.family=my_package.my_module:MY_FAMILY`. Its module is single-device code; everything parallel follows from this.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch

from titan.config.schema import ModelConfig
from titan.errors import ConfigError, Problem

if TYPE_CHECKING:
    from titan.models.decoder import Decoder
    from titan.models.init import Draw

BUILT_IN = {"llama": "titan.models.llama:LLAMA"}


class Cut(Enum):
    """What tensor parallelism does with a module."""

    words = "an embedding: every rank has some words; what they give is summed"
    rows = "a linear layer whose outputs are shared out"
    columns = "a linear layer whose inputs are shared out; what the ranks give is summed"
    output = "the projection to words: every rank has some"
    enter = "a module that needs the whole sequence; the modules in it are cut"
    whole = "every rank has all of it, and uses it between the cut modules, on its part of the sequence"
    shared = "every rank has all of it, and uses it inside a cut module, on its own heads"


@dataclass(frozen=True)
class ModelFamily:
    """A kind of model."""

    build: Callable[[ModelConfig, int], Decoder]
    """The model for a shape and a row's length in tokens; called on the meta device, so it draws nothing."""
    draw: Callable[[str, ModelConfig], Draw | None]
    """How the parameter of a name is drawn; None fills it with ones. See `titan.models.init`."""
    tensor_plan: Mapping[str, Cut]
    """By patterns of module names. Every module that has parameters must be in it."""
    hugging_face_names: Mapping[str, str]
    """Module names to those of the transformers library; * stands for a block's index on both sides."""
    count_parameters: Callable[[ModelConfig], int]
    """All parameters of the whole model."""
    flops_per_token: Callable[[ModelConfig, int], int]
    """Floating-point operations of forward and backward for each token, at a row's length in tokens."""

    rotary: tuple[str, ...] = ()
    """Patterns of the modules whose outputs are turned by rotary positions; transformers has their rows in another
    order."""

    def cut_of(self, module: str) -> Cut | None:
        """Return what the tensor plan says of a module, by its name."""
        return next((cut for pattern, cut in self.tensor_plan.items() if _fits(module, pattern)), None)

    def is_rotary(self, parameter: str) -> bool:
        """Return whether a parameter's rows stand in another order in the transformers library."""
        return any(_fits(parameter.rpartition(".")[0], pattern) for pattern in self.rotary)

    def parameter_shapes(self, config: ModelConfig) -> dict[str, torch.Size]:
        """Return the shape of every parameter of the whole model; what is tied counts once, as the embedding."""
        with torch.device("meta"):
            model = self.build(config, 1)
        return {name: parameter.shape for name, parameter in model.named_parameters()}

    def hugging_face_name(self, parameter: str) -> str:
        """Return what the transformers library calls a parameter.

        Raises:
            KeyError: If the description does not say.
        """
        module, _, last = parameter.rpartition(".")
        for pattern, name in self.hugging_face_names.items():
            if _fits(module, pattern):
                index = next((part for part in module.split(".") if part.isdigit()), "")
                return f"{name.replace('*', index)}.{last}"
        raise KeyError(parameter)


def load_family(name: str) -> ModelFamily:
    """Return the family that `model.family` names.

    Args:
        name: llama, or module:attribute.

    Raises:
        ConfigError: If there is none.
    """
    module, _, attribute = BUILT_IN.get(name, name).partition(":")
    reason = f"Families: {', '.join(BUILT_IN)}, or one of your own as package.module:NAME."
    others: list[str] = []
    if module and attribute:
        try:
            found = importlib.import_module(module)
            others = [each for each, value in vars(found).items() if isinstance(value, ModelFamily)]
            family = getattr(found, attribute)
        except (ImportError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
        else:
            if isinstance(family, ModelFamily):
                return family
            reason = f"{attribute} is a {type(family).__name__}, not a titan.models.family.ModelFamily."
    meant = [*(f"model.family={module}:{each}" for each in others), "model.family=llama"]
    raise ConfigError([Problem(f"model.family = {name} is no model family", reason, "   or  ".join(meant))])


def _fits(module: str, pattern: str) -> bool:
    # part by part, or * would also match dots
    parts, patterns = module.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))
