"""Documents that share a row, and what a change of one does to the others. Runs inside a pool's ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from titan.data.loader import Batch
from titan.models.family import load_family
from titan.parallel.context import positions_of_rank
from titan.parallel.mesh import build_mesh
from titan.trainer.model import build_model

from .flex import flex_on_cpu
from .layouts import layout_config

ENDS = (11, 24, 32)
"""Where the documents of a row of 32 end: none at the edge of any rank's share of it, but the last."""
BEGINS = (0, *ENDS[:-1])


def make_batch(changed: int | None, counted: int, rows: int, apart: bool) -> Batch:
    """Return rows of three documents, one of them with other tokens, where one document's labels count."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 250, (rows, ENDS[-1]), generator=generator)
    labels = torch.full_like(tokens, -100)
    counts = slice(BEGINS[counted], ENDS[counted])
    labels[:, counts] = tokens[:, counts].roll(-1, 1)
    if changed is not None:
        tokens[:, BEGINS[changed] : ENDS[changed]] = (tokens[:, BEGINS[changed] : ENDS[changed]] + 97) % 250
    starts = torch.cat([torch.full((end - begin,), begin) for begin, end in zip(BEGINS, ENDS, strict=True)])
    return Batch(tokens, labels, starts.expand(rows, -1).contiguous() * apart)


def effects_on_flex(world_size: int, overrides: tuple[str, ...]) -> dict[str, list[list[bool]]]:
    """Return the same as `effects`, of FlexAttention."""
    with flex_on_cpu():
        return effects(world_size, overrides)


def effects(world_size: int, overrides: tuple[str, ...], apart: bool = True) -> dict[str, list[list[bool]]]:
    """Return which documents' losses, gradients and logits a change of each document changes.

    Args:
        world_size: How many ranks.
        overrides: The layout.
        apart: Whether the model is told where documents begin; else the row is one document to it.

    Returns:
        By name, a table: row for the document that changes, column for the one that is looked at. No logits in a
        pipeline, whose stages keep them.
    """
    config = layout_config(world_size, ("data.mask_documents=true", *overrides))
    settings, rows = config.parallelism, config.training.local_batch_size
    mesh = build_mesh(settings, "cpu")
    model = build_model(config, load_family(config.model.family), mesh, torch.device("cpu"))
    positions = None
    if settings.cp > 1:
        positions = positions_of_rank(ENDS[-1], settings.cp, mesh.coordinates["cp"], settings.cp_head_tail)

    def run(changed: int | None, counted: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        batch = make_batch(changed, counted, rows, apart)
        for _, parameter in model.parameters:
            parameter.grad = None
        valid = torch.tensor((batch.labels != -100).sum().item() * mesh.data_ranks)
        loss = model.forward_backward([batch.at(positions)], valid)
        # of the weights that both documents share; an embedding has rows of its own for other tokens, with zeros
        shared = [p.grad for name, p in model.parameters if p.grad is not None and "tok_embeddings" not in name]
        return loss, [(x.to_local() if isinstance(x, DTensor) else x).clone() for x in shared]

    def logits(changed: int | None) -> list[torch.Tensor]:
        batch = make_batch(changed, 0, rows, apart).at(positions)
        with torch.no_grad():
            mine = model.parts[0](batch.tokens, batch.starts)
        whole = torch.zeros(rows, ENDS[-1], mine.shape[-1])
        whole[:, torch.arange(ENDS[-1]) if positions is None else positions] = mine
        return [whole[:, begin:end] for begin, end in zip(BEGINS, ENDS, strict=True)]

    documents = range(len(ENDS))
    before = [run(None, counted) for counted in documents]
    found: dict[str, list[list[bool]]] = {"loss": [], "gradients": []}
    for changed in documents:
        after = [run(changed, counted) for counted in documents]
        found["loss"].append([not a[0].equal(b[0]) for a, b in zip(after, before, strict=True)])
        found["gradients"].append(
            [not all(x.equal(y) for x, y in zip(a[1], b[1], strict=True)) for a, b in zip(after, before, strict=True)]
        )
    if settings.pp == 1:
        whole = logits(None)
        found["logits"] = [
            [not a.equal(b) for a, b in zip(logits(changed), whole, strict=True)] for changed in documents
        ]
    everyone: list[dict[str, list[list[bool]]] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    return {
        name: [[any(each[name][a][b] for each in everyone if each) for b in documents] for a in documents]
        for name in found
    }
