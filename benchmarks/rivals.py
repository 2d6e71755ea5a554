"""What titan's training speed is compared with: each rival as its own users run it, in a process of its own.

    transformers   a plain loop over `transformers.LlamaForCausalLM`, as one writes it by hand
    torchtitan     the trainer of the package torchtitan 0.2.2, none of whose training code is changed

Both get the rows that titan trains on, ready-made and in the same order, and are timed from outside: from the end of
one step to the end of another, so that what they do between two steps is in it, as it is in titan's own times.

TorchTitan has no CPU among its devices and imports triton for a model that is not used here. So, on a CPU, from
outside: a stand-in for triton while it is imported, and for its look-ups of the device.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import math
import os
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

WARM_UP = 2
"""Steps before those that are timed, on a CPU; what is compiled is compiled in the first."""


@dataclass(frozen=True)
class Run:
    """What one process is to do."""

    frozen: str
    """The config of titan's side: the model, the rows and the optimizer are taken from it."""
    steps: int
    """All of them."""
    warm_up: int = WARM_UP
    """Those that come before what is measured."""
    compile: bool = False
    bfloat16: bool = False
    float8: bool = False
    recompute: str = "none"
    """Activation checkpointing: none, or selective."""
    kept_memory: bool = False
    """Tell the C library to keep freed memory, as titan does."""


def main() -> None:
    """Run one rival and print its figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=["transformers", "torchtitan"])
    parser.add_argument("run", help="a Run as JSON")
    given = parser.parse_args()
    run = Run(**json.loads(given.run))
    if run.kept_memory:
        _keep_freed_memory()
    print(json.dumps({"transformers": run_transformers, "torchtitan": run_torchtitan}[given.side](run)))


def command(side: str, run: Run) -> list[str]:
    """Return the command of a rival's process."""
    return [sys.executable, __file__, side, json.dumps(asdict(run))]


def run_transformers(run: Run) -> dict[str, Any]:
    """Train transformers' Llama as a person would by hand."""
    import torch
    import torch.nn.functional as F
    from transformers import LlamaConfig, LlamaForCausalLM

    if run.float8 or run.recompute != "none":
        raise SystemExit("the plain loop has neither float8 nor activation checkpointing")
    config = _config(run)
    device = torch.device(config.cluster.device.name)
    shape, settings = config.model, config.optimizer
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.dim,
            intermediate_size=shape.ffn_dim,
            num_hidden_layers=shape.n_layers,
            num_attention_heads=shape.n_heads,
            num_key_value_heads=shape.n_kv_heads,
            max_position_embeddings=config.training.seq_len,
            rms_norm_eps=shape.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
            tie_word_embeddings=shape.tie_embeddings,
            attn_implementation="sdpa",  # type: ignore[call-arg]  # the class takes it among its other arguments
            use_cache=False,
        )
    )
    model.to(device)  # type: ignore[reportArgumentType]
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )

    def loss_of(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=tokens).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    if run.compile:
        loss_of = torch.compile(loss_of)
    losses: list[torch.Tensor] = []
    batches = _read_batches(run)
    clock = _Clock(run, device)
    for tokens, labels in batches:
        tokens, labels = tokens.to(device), labels.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=run.bfloat16):
            loss = loss_of(tokens, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
        clock.end_step()
    return _figures(clock, losses, sum(parameter.numel() for parameter in model.parameters()), device)


def run_torchtitan(run: Run) -> dict[str, Any]:
    """Train with torchtitan's own trainer."""
    import torch

    config = _config(run)
    on_cpu = config.cluster.device.name == "cpu"
    if on_cpu:
        _stand_in_for_triton()
        _point_at_cpu()
    from torchtitan.config import JobConfig  # type: ignore[reportMissingImports]
    from torchtitan.models import llama3  # type: ignore[reportMissingImports]
    from torchtitan.protocols.train_spec import register_train_spec  # type: ignore[reportMissingImports]
    from torchtitan.train import Trainer  # type: ignore[reportMissingImports]

    for name in [name for name in sys.modules if name.split(".")[0] == "triton"] if on_cpu else []:
        del sys.modules[name]  # or the compiler would take it for the real one
    shape, training, settings = config.model, config.training, config.optimizer
    arguments = llama3.TransformerModelArgs(
        dim=shape.dim,
        n_layers=shape.n_layers,
        n_heads=shape.n_heads,
        n_kv_heads=shape.n_kv_heads,
        vocab_size=shape.vocab_size,
        norm_eps=shape.norm_eps,
        rope_theta=shape.rope_theta,
        **_feed_forward(shape.dim, shape.ffn_dim),
    )
    batches = _read_batches(run)
    spec = replace(
        llama3.get_train_spec(),
        model_args={"same": arguments},
        build_tokenizer_fn=None,
        build_dataloader_fn=lambda **_: _Rows(batches),
    )
    register_train_spec("llama3_same", spec)
    job: Any = JobConfig()
    job.model.name, job.model.flavor = "llama3_same", "same"
    job.job.dump_folder = tempfile.mkdtemp()
    job.training.steps, job.training.seq_len = len(batches), training.seq_len
    job.training.local_batch_size, job.training.max_norm = training.local_batch_size, 1.0
    job.training.mixed_precision_param = "bfloat16" if run.bfloat16 else "float32"
    job.optimizer.lr, job.optimizer.eps, job.optimizer.weight_decay = settings.lr, settings.eps, settings.weight_decay
    job.optimizer.beta1, job.optimizer.beta2 = settings.beta1, settings.beta2
    job.optimizer.implementation = "fused"
    job.lr_scheduler.warmup_steps = 0
    job.activation_checkpoint.mode = run.recompute  # type: ignore[reportAttributeAccessIssue]
    job.compile.enable = run.compile
    job.metrics.log_freq = 1_000_000  # the first step is logged whatever it says
    if run.float8:
        job.model.converters = ["quantize.linear.float8"]
        job.quantize.linear.float8.enable_fsdp_float8_all_gather = True
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    with tempfile.NamedTemporaryFile() as store:
        torch.distributed.init_process_group(
            "gloo" if on_cpu else "nccl", init_method=f"file://{store.name}", rank=0, world_size=1
        )
        trainer: Any = Trainer(job)
        losses: list[torch.Tensor] = []
        step, forward_backward = trainer.train_step, trainer.forward_backward_step
        clock = _Clock(run, trainer.device)

        def timed(data: Any) -> None:
            step(data)
            clock.end_step()

        def kept(**given: Any) -> torch.Tensor:
            loss = forward_backward(**given)
            losses.append(loss.detach())
            return loss

        trainer.train_step, trainer.forward_backward_step = timed, kept  # type: ignore[reportAttributeAccessIssue]
        trainer.train()
        parameters = sum(parameter.numel() for part in trainer.model_parts for parameter in part.parameters())
        device = trainer.device
        trainer.close()
        torch.distributed.destroy_process_group()
    return _figures(clock, losses, parameters, device)


class _Rows:
    """Ready-made batches, as torchtitan's trainer takes them from a loader."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter([({"input": tokens}, labels) for tokens, labels in self.batches])

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def _feed_forward(dim: int, ffn_dim: int) -> dict[str, Any]:
    """Return the two numbers from which torchtitan computes the feed-forward width, where they give `ffn_dim`."""
    for multiple in (256, 128, 64, 1024, 32, 16):
        for multiplier in (None, ffn_dim / int(8 * dim / 3)):
            hidden = int((multiplier or 1.0) * int(8 * dim / 3))
            if multiple * math.ceil(hidden / multiple) == ffn_dim:
                return {"multiple_of": multiple, "ffn_dim_multiplier": multiplier}
    raise SystemExit(f"torchtitan has no way to say a feed-forward width of {ffn_dim} with dim {dim}")


def _stand_in_for_triton() -> None:
    import importlib.util

    if importlib.util.find_spec("triton") is not None:
        return
    import torch._inductor.compile_fx  # noqa: F401
    from torch.utils._triton import has_triton_package

    assert not has_triton_package()  # which is remembered, so that PyTorch never takes this for the real one
    triton, language = types.ModuleType("triton"), types.ModuleType("triton.language")
    triton.jit = lambda function: function  # type: ignore[attr-defined]
    triton.language = language  # type: ignore[attr-defined]
    language.constexpr = int  # type: ignore[attr-defined]
    sys.modules |= {"triton": triton, "triton.language": language}


def _point_at_cpu() -> None:
    import torchtitan.tools.utils  # type: ignore[reportMissingImports]  # noqa: F401

    memory = types.SimpleNamespace(total_memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    nothing: dict[str, Any] = {
        "set_device": lambda device: None,
        "current_device": lambda: 0,
        "get_device_name": lambda device: "CPU",
        "get_device_properties": lambda device: memory,
        "memory_stats": lambda device: {},
        "reset_peak_memory_stats": lambda: None,
        "empty_cache": lambda: None,
        "synchronize": lambda: None,
    }
    here = {"device_type": "cpu", "device_module": types.SimpleNamespace(**nothing)}
    for module in [module for name, module in sys.modules.items() if name.startswith("torchtitan")]:
        for name in here.keys() & vars(module).keys():
            setattr(module, name, here[name])


def _config(run: Run) -> Any:
    from titan.config.load import load_config

    return load_config(Path(run.frozen))


def _read_batches(run: Run) -> list[Any]:
    """Return the very rows that titan's side trains on, in the same order."""
    from titan.data.loader import collate
    from titan.data.mixture import load_rows
    from titan.data.prepare import Preparation
    from titan.data.tokenizer import build_tokenizer

    config = _config(run)
    preparation = Preparation(build_tokenizer(config.tokenizer), config.data.cache_dir or "")
    rows = load_rows(config.data, config.training.seq_len, preparation)
    order = rows.order(config.training.local_batch_size, config.training.seed)
    batches = [collate(rows.read(order.rows_of_step(step))) for step in range(run.steps)]
    return [(batch.tokens, batch.labels) for batch in batches]


class _Clock:
    """Times steps from end to end: each on a CPU; on a GPU all that are measured together, for the host is ahead."""

    def __init__(self, run: Run, device: Any) -> None:
        self.run, self.is_cuda, self.ends = run, device.type == "cuda", [time.perf_counter()]

    def end_step(self) -> None:
        import torch

        if self.is_cuda and len(self.ends) in (1, self.run.warm_up, self.run.steps):
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def step_seconds(self) -> list[float]:
        """Return the times of the measured steps; of a GPU's, their mean."""
        ends = self.ends[self.run.warm_up :]
        if self.is_cuda:
            return [(ends[-1] - ends[0]) / (len(ends) - 1)]
        return [end - begin for begin, end in itertools.pairwise(ends)]


def _figures(clock: _Clock, losses: list[Any], parameters: int, device: Any) -> dict[str, Any]:
    from titan.metrics.memory import peak_memory_gib

    return {
        "step_seconds": clock.step_seconds(),
        "first_step_seconds": clock.ends[1] - clock.ends[0],
        "peak_memory_gib": peak_memory_gib(device),
        "first_loss": float(losses[0]),
        "last_loss": float(losses[-1]),
        "parameters": parameters,
    }


def _keep_freed_memory() -> None:
    mallopt = ctypes.CDLL(None).mallopt
    for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-8, 1)):  # mmap_max, trim_threshold, arena_max
        mallopt(parameter, value)


if __name__ == "__main__":
    main()
