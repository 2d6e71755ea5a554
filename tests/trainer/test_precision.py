"""A single rank, which has nothing to share, beside the same rank with FSDP around its model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from tests.support.command import results
from titan.checkpoint.canonical import state_digests
from titan.checkpoint.manifest import step_folder
from titan.trainer.build import Trainer

from .conftest import Runs

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler's own: it looks at what is deprecated, too


def has_fsdp(trainer: Trainer) -> bool:
    """Return whether anything of a trainer's model is FSDP's."""
    return any(isinstance(module, FSDPModule) for part in trainer.parts for module in part.modules())


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("training.param_dtype=bfloat16",),
        ("training.param_dtype=bfloat16", "training.global_batch_size=6"),
        ("training.param_dtype=bfloat16", "training.loss_chunk_size=0"),
        ("training.param_dtype=bfloat16", "activation_checkpoint=full"),
        ("training.param_dtype=bfloat16", "activation_checkpoint=selective", "compile=inductor"),
        ("training.param_dtype=bfloat16", "float8=rowwise", "float8.emulate=true"),
        ("model.tie_embeddings=true",),
    ],
    ids=lambda overrides: " ".join(overrides) or "float32",
)
def test_it_computes_what_fsdp_would(runs: Runs, share: Callable[[], None], overrides: tuple[str, ...]) -> None:
    """Every loss, norm, weight and moment, to the bit."""
    alone = runs.train("alone", *overrides)
    share()
    shared = runs.train("shared", *overrides)
    assert (has_fsdp(alone), has_fsdp(shared)) == (False, True)
    assert results(alone.directory.path) == results(shared.directory.path)
    ours, theirs = (state_digests(step_folder(each.directory.checkpoints, 6)) for each in (alone, shared))
    assert ours == theirs


def test_a_shared_embedding_rounds_once_less(runs: Runs, share: Callable[[], None]) -> None:
    """Its two gradients are added in float32, where FSDP adds them in bfloat16: nearly the same run."""
    overrides = ("model.tie_embeddings=true", "training.param_dtype=bfloat16")
    alone = runs.train("alone", *overrides)
    share()
    shared = runs.train("shared", *overrides)
    assert alone.parts[0].output.weight.dtype is torch.bfloat16  # type: ignore[union-attr]
    ours, theirs = (torch.tensor(results(each.directory.path)) for each in (alone, shared))
    assert not torch.equal(ours, theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
