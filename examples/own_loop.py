"""A training loop of one's own on titan's parts: any layout, the same weights, rows and losses as titan.train.

    python examples/own_loop.py training.steps=5
    torchrun --nproc-per-node 2 examples/own_loop.py training.steps=5 parallelism.tp=2

Every line of the loop may be exchanged: another optimizer, another loss on top, other data. What depends on the layout
is in the parts: `forward_backward` runs a pipeline or a whole model, the groups of the mesh know who has other tokens.
"""

import sys

import torch.distributed as dist

import titan
from titan.config.check import check_config
from titan.errors import TitanError
from titan.launch.environment import Rank, current_machine, current_rank
from titan.models.family import load_family
from titan.optim.build import build_optimizer
from titan.optim.clip import clip_gradients, global_grad_norm
from titan.optim.schedule import lr_factor, set_learning_rate
from titan.parallel.mesh import build_mesh
from titan.trainer.ahead import prepare_steps
from titan.trainer.build import build_feed, held_positions
from titan.trainer.loss import count_valid_tokens
from titan.trainer.model import build_model
from titan.worker import join_ranks, meet


def main() -> None:
    """Train as the overrides on the command line say, without checkpoints and logs."""
    config = check_config(titan.compose(*sys.argv[1:]), current_machine())
    rank, steps = current_rank() or Rank(), config.training.steps
    device, data = join_ranks(config, rank, meet(rank, 600) if rank.has_store else None)
    mesh = build_mesh(config.parallelism, device.type)
    model = build_model(config, load_family(config.model.family), mesh, device)
    optimizer = build_optimizer(model.parameters, config.optimizer, device)
    weights = [weight for _, weight in model.parameters]
    feed = build_feed(config, data, mesh.data_rank, mesh.data_ranks)

    for step in prepare_steps(feed.steps(0, steps, ()), device, held_positions(config, mesh)):
        optimizer.zero_grad()
        set_learning_rate(optimizer, config.optimizer.lr * lr_factor(step.number - 1, steps, config.lr_scheduler))
        valid_tokens = count_valid_tokens([batch.labels for batch in step.batches], mesh.loss_group)[0]
        loss = model.forward_backward(step.batches, valid_tokens.float())  # divided before the backward pass
        dist.all_reduce(loss, group=mesh.loss_group)
        if mesh.stage_group is not None:  # only the last pipeline stage knows it
            dist.all_reduce(loss, group=mesh.stage_group)
        norm = global_grad_norm(weights, device, mesh.stage_group, model.copies)
        clip_gradients(weights, norm, config.training.max_grad_norm)
        optimizer.step()
        model.weights_changed()
        if rank.rank == 0:
            print(f"step {step.number}  loss {loss.item():.6f}  grad {norm.item():.6f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except TitanError as error:
        sys.exit(str(error))
