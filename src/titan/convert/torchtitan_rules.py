"""What an option of TorchTitan is in titan where it is not the same word: a rule for each, and for a few together.

A rule gets the option's value and all the others, because many mean something only together: how often a block is
recomputed needs the mode and the option of the mode. It returns titan's groups and keys, or raises `NoEquivalent`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Overrides = dict[str, Any]
"""Titan's groups and keys with the values that they get."""


class NoEquivalent(Exception):
    """A value that titan has nothing for; the text is the reason."""


@dataclass(frozen=True)
class Given:
    """All options of a TorchTitan config, by section.name, with TorchTitan's defaults for what the file leaves out."""

    values: Mapping[str, Any]
    """Every option's value."""
    named: frozenset[str]
    """The options that the file names."""
    data_ranks: int = 1
    """Ranks that see different rows."""

    def __getitem__(self, name: str) -> Any:
        return self.values[name]


Rule = Callable[[Any, Given], Overrides]


def named(key: str, names: Mapping[Any, Any]) -> Rule:
    """Return a rule for a choice among names."""

    def rule(value: Any, given: Given) -> Overrides:
        if value not in names:
            known = ", ".join(str(name) for name in names)
            raise NoEquivalent(f"known are {known}")
        return {key: names[value]}

    return rule


def elsewhere(value: Any, given: Given) -> Overrides:
    """Say nothing: the rule of another option takes it into account."""
    return {}


# model ----------------------------------------------------------------------------------------------------------------

FLAVORS = {"debugmodel": "llama3_debug", "8B": "llama3_8b", "70B": "llama3_70b", "405B": "llama3_405b"}
"""TorchTitan's flavors of llama3 and titan's options of `model`."""
N_LAYERS = {"debugmodel": 6, "8B": 32, "70B": 80, "405B": 126}
"""Blocks of each flavor."""


def model_name(value: str, given: Given) -> Overrides:
    """Accept Llama alone."""
    if value != "llama3":
        raise NoEquivalent(f"titan trains Llama; a model such as {value} would be a family of your own, model.family")
    return {}


def flavor(value: str, given: Given) -> Overrides:
    """Name the shape, and whether documents see each other."""
    size, _, attention = value.partition("_")
    if size not in FLAVORS or attention not in ("", "flex", "flex_attn", "varlen", "varlen_attn"):
        raise NoEquivalent(f"known are {', '.join(FLAVORS)}, with _flex or _varlen behind them")
    overrides: Overrides = {"model": FLAVORS[size]}
    if attention:
        overrides["data.mask_documents"] = True
    return overrides


def tokenizer(value: str | None, given: Given) -> Overrides:
    """Choose what reads a tokenizer, by what its path looks like."""
    if value is None:
        return {}
    kind = "tiktoken" if value.endswith(".model") else "huggingface"
    return {"tokenizer": kind, "tokenizer.path": value}


def hf_assets(value: str, given: Given) -> Overrides:
    """Take the tokenizer of a folder of assets, unless the deprecated option names another."""
    return {} if given["model.tokenizer_path"] is not None else tokenizer(value, given)


def converters(value: list[str], given: Given) -> Overrides:
    """Choose float8's recipe."""
    other = [name for name in value if name != "float8"]
    if other:
        raise NoEquivalent(f"titan has float8 alone, not {', '.join(other)}")
    recipe = given["quantize.linear.float8.recipe_name"] or "tensorwise"
    return {"float8": recipe} if value else {}


# optimizer ------------------------------------------------------------------------------------------------------------


def optimizer_name(value: str, given: Given) -> Overrides:
    """Accept AdamW, and Adam where it is the same."""
    if value == "AdamW" or (value == "Adam" and given["optimizer.weight_decay"] == 0):
        return {}
    raise NoEquivalent("titan has AdamW; Adam is the same at weight_decay = 0, and adds the decay to the gradient else")


def weight_decay(value: float, given: Given) -> Overrides:
    """Decay every parameter, as TorchTitan does."""
    decays = value != 0
    return {"optimizer.weight_decay": value, "optimizer.decay_embeddings": decays, "optimizer.decay_norms": decays}


def warmup(value: int, given: Given) -> Overrides:
    """Choose the schedule that decays right after the warm-up, and shorten the warm-up as TorchTitan does."""
    return {"lr_scheduler": "linear", "lr_scheduler.warmup_steps": min(value, given["training.steps"])}


def total_steps(value: int | None, given: Given) -> Overrides:
    """Accept a schedule that is as long as the run."""
    if value is not None and value != given["training.steps"]:
        raise NoEquivalent(
            "a schedule is as long as its run: train with training.steps = total_steps and stop it when you like "
            "(Ctrl-C saves)"
        )
    return {}


# data -----------------------------------------------------------------------------------------------------------------

_C4_TEST = "tests/assets/c4_test/data.json"


def dataset(value: str, given: Given) -> Overrides:
    """Name the text, which TorchTitan knows by names of its own."""
    path, name = given["training.dataset_path"], value.lower()
    if name == "c4_test":
        return {"data": "jsonl", "data.path": path or _C4_TEST}
    if name == "c4":
        where = {"data": "c4"} if path is None else {"data": "huggingface", "data.dataset": path, "data.subset": "en"}
        return {**where, "data.streaming": True}
    raise NoEquivalent(
        f"{value} is a dataset of your own code: add data=huggingface data.dataset=..., data=jsonl data.path=... or "
        "another; as it stands, the command trains on titan's default, the source of Python's standard library"
    )


def validation(value: bool, given: Given) -> Overrides:
    """Name the held-out text, how often and how much of it."""
    if not value:
        return {}
    name, path, steps = (given[f"validation.{option}"] for option in ("dataset", "dataset_path", "steps"))
    rows = -1 if steps == -1 else steps * given["validation.local_batch_size"] * given.data_ranks
    common = {"validation.interval": given["validation.freq"], "validation.rows": rows}
    if name.lower() == "c4_validation":
        if path is None:
            return {"validation": "c4", **common}
        where = {"validation.data.dataset": path, "validation.data.subset": "en"}
        return {"validation": "huggingface", **where, **common}
    if name.lower() == "c4_test":
        return {"validation": "jsonl", "validation.data.path": path or _C4_TEST, **common}
    raise NoEquivalent(f"{name} is a dataset of your own code: add validation=huggingface, validation=jsonl ...")


def validation_seq_len(value: int, given: Given) -> Overrides:
    """Accept rows as long as in training."""
    if value != given["training.seq_len"]:
        raise NoEquivalent(f"validation has rows of training.seq_len = {given['training.seq_len']}")
    return {}


def param_dtype(value: str, given: Given) -> Overrides:
    """Leave titan's choice alone where the file does not make one."""
    return {"training.param_dtype": value} if "training.mixed_precision_param" in given.named else {}


def dtype(value: str, given: Given) -> Overrides:
    """Accept weights in float32."""
    if value != "float32":
        raise NoEquivalent(
            "weights and the optimizer's moments are float32; only what is computed with them is rounded"
        )
    return {}


def prefetch(value: int | None, given: Given) -> Overrides:
    """Leave titan's default alone where none is set."""
    return {} if value is None else {"data.prefetch": value}


# parallelism ----------------------------------------------------------------------------------------------------------


def microbatch(value: int, given: Given) -> Overrides:
    """Turn the rows of a piece into a number of pieces."""
    rows = given["training.local_batch_size"]
    if given["parallelism.pipeline_parallel_degree"] == 1 or value == 1:
        return {}
    if value < 1 or rows % value:
        raise NoEquivalent(f"{value} does not divide training.local_batch_size = {rows}")
    return {"parallelism.pp_microbatches": rows // value}


def layers_per_stage(value: int | None, given: Given) -> Overrides:
    """Turn layers of a stage into stages of a rank."""
    ranks = given["parallelism.pipeline_parallel_degree"]
    if value is None or ranks == 1:
        return {}
    less = (given[f"parallelism.pipeline_parallel_{end}_stage_less_layers"] for end in ("first", "last"))
    stages = math.ceil((N_LAYERS.get(given["model.flavor"].partition("_")[0], 0) + sum(less)) / value)
    if stages % ranks:
        raise NoEquivalent(f"it makes {stages} stages, which {ranks} pipeline ranks cannot share out")
    if given["parallelism.pipeline_parallel_schedule"] in ("1F1B", "GPipe"):
        return {}
    return {"parallelism.pp_stages_per_rank": stages // ranks}


def schedule(value: str, given: Given) -> Overrides:
    """Accept PyTorch's schedules by name, however they are spelled."""
    names = {name.lower(): name for name in SCHEDULES}
    if value.lower() not in names:
        if given["parallelism.pipeline_parallel_schedule_csv"]:
            return {}
        raise NoEquivalent(f"schedules: {', '.join(SCHEDULES)}, or one of your own as parallelism.pp_schedule_csv")
    return {"parallelism.pp_schedule": names[value.lower()]}


SCHEDULES = ("GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")


def csv(value: str | None, given: Given) -> Overrides:
    """Turn an empty text into none."""
    return {"parallelism.pp_schedule_csv": value or None}


def load_balancer(value: str, given: Given) -> Overrides:
    """Accept balancing from head and tail."""
    if value != "headtail":
        raise NoEquivalent("titan balances from head and tail, or with parallelism.cp_head_tail=false not at all")
    return {"parallelism.cp_head_tail": True}


def loss_parallel(value: bool, given: Given) -> Overrides:
    """Turn a negated switch around."""
    return {"parallelism.loss_parallel": not value}


# checkpoint -----------------------------------------------------------------------------------------------------------


def checkpoint(value: bool, given: Given) -> Overrides:
    """Choose whether and how checkpoints are written."""
    modes = {"disabled": "sync", "async": "async", "async_with_pinned_mem": "async_pinned"}
    if not value:
        return {"checkpoint": "disabled"}
    return {"checkpoint": modes.get(given["checkpoint.async_mode"], "sync")}


def initial_load(value: str | None, given: Given) -> Overrides:
    """Start from a Hugging Face folder."""
    if value is None:
        return {}
    if not given["checkpoint.initial_load_in_hf"]:
        raise NoEquivalent(
            "titan reads its own checkpoints and Hugging Face folders: have TorchTitan save its last one with "
            "last_save_in_hf = true, and give that folder as checkpoint.initial_load"
        )
    return {"checkpoint.initial_load": value}


def initial_content(value: bool, given: Given) -> Overrides:
    """Accept the weights alone."""
    if value or given["checkpoint.initial_load_path"] is None:
        return {}
    raise NoEquivalent("the optimizer's state of a TorchTitan checkpoint cannot be taken over")


def last_content(value: bool, given: Given) -> Overrides:
    """Say what the last checkpoint holds."""
    return {"checkpoint.last_content": "weights" if value else "all"}


def export_dtype(value: str, given: Given) -> Overrides:
    """Say in which format the last weights are saved."""
    if not given["checkpoint.last_save_model_only"] or value == "float32":
        return {}
    if value == "float16":
        raise NoEquivalent("python -m titan.convert export --dtype float16 makes such weights of a checkpoint")
    return {"checkpoint.last_dtype": value}


def exclude(value: list[str], given: Given) -> Overrides:
    """Turn names of parts into patterns of tensors."""
    if given["checkpoint.initial_load_path"] is None or not value:
        return {}
    patterns = [
        f"{name}.*" if name == "optimizer" else f"model.{name}*"
        for name in value
        if name not in ("lr_scheduler", "dataloader", "train_state")  # of which a titan checkpoint holds nothing
    ]
    return {"checkpoint.exclude": patterns}


# activation checkpointing, compile, float8 ----------------------------------------------------------------------------


def recompute(value: str, given: Given) -> Overrides:
    """Choose what is recomputed."""
    option = str(given["activation_checkpoint.selective_ac_option"])
    if value == "selective" and option == "op":
        return {"activation_checkpoint": "selective"}
    if value == "selective":
        if not option.isdigit():
            raise NoEquivalent(f"selective_ac_option is op or a number of layers, not {option}")
        if int(option) == 0:
            return {"activation_checkpoint": "full"}
        return {"activation_checkpoint": "every_nth", "activation_checkpoint.every": int(option)}
    if value == "memory_budget":
        budget = given["activation_checkpoint.memory_budget"]
        return {"activation_checkpoint": value, "activation_checkpoint.memory_budget": budget}
    if value == "none":
        return {}
    if value != "full":
        raise NoEquivalent("modes: none, full, selective, every_nth, memory_budget")
    return {"activation_checkpoint": value}


def compile_(value: bool, given: Given) -> Overrides:
    """Choose what is compiled, by which backend."""
    parts = given["compile.components"]
    if not value or not parts:
        return {}
    if "model" not in parts:
        raise NoEquivalent("the loss is compiled together with the blocks, not alone")
    return {"compile": "inductor", "compile.loss": "loss" in parts, "compile.backend": given["compile.backend"]}


def has_float8(given: Given) -> bool:
    """Return whether matrix products are float8."""
    return given["model.converters"] == ["float8"]


def float8_gather(value: bool, given: Given) -> Overrides:
    """Gather in float8 where there is something to gather, or nowhere."""
    if not has_float8(given) or given["quantize.linear.float8.recipe_name"] in ("rowwise", "rowwise_with_gw_hp"):
        return {}
    return {"float8.fsdp_all_gather": None if value else False}


def float8_scales(value: bool, given: Given) -> Overrides:
    """Compute scales in one exchange wherever weights are gathered so, or nowhere."""
    gathers = given["quantize.linear.float8.enable_fsdp_float8_all_gather"]
    return {"float8.precompute_scales": False} if has_float8(given) and gathers and not value else {}


def float8_filter(value: list[str], given: Given) -> Overrides:
    """Tell names of modules from the two that mean something of their own."""
    if not has_float8(given):
        return {}
    names = [name for name in value if name not in ("auto_filter_small_kn", "output")]
    return {
        "float8.filter_fqns": names,
        "float8.auto_filter_small_kn": "auto_filter_small_kn" in value,
        "float8.convert_output": "output" not in value,
    }


def float8_emulate(value: bool, given: Given) -> Overrides:
    """Emulate where there is something to."""
    return {"float8.emulate": value} if has_float8(given) else {}


# time, steps ----------------------------------------------------------------------------------------------------------


def profiling(value: bool, given: Given) -> Overrides:
    """Choose the steps that TorchTitan would look at first."""
    snapshot = given["profiling.enable_memory_snapshot"]
    if not value and not snapshot:
        return {}
    steps = given["profiling.profiler_active"]
    start = given["profiling.profile_freq"] - steps + 1
    if start + steps - 1 > given["training.steps"]:
        raise NoEquivalent("profile_freq lies beyond training.steps, so that TorchTitan would look at no step either")
    overrides: Overrides = {"profiling": "trace" if value else "memory"}
    overrides |= {"profiling.start_step": start, "profiling.steps": steps}
    return overrides | ({"profiling.memory_snapshot": True} if snapshot else {})


def snapshot(value: bool, given: Given) -> Overrides:
    """Look at memory, beside the time or alone."""
    return profiling(given["profiling.enable_profiling"], given) if value else {}


def seed(value: int | None, given: Given) -> Overrides:
    """Leave titan's default alone where none is set."""
    return {} if value is None else {"training.seed": value}


def first_timeout(value: int, given: Given) -> Overrides:
    """Limit a collective, where the file says so."""
    return {"cluster.timeout_seconds": value} if "comm.init_timeout_seconds" in given.named else {}


def step_timeout(value: int, given: Given) -> Overrides:
    """Limit a step, where the file says so."""
    return {"fault_tolerance.step_timeout_seconds": value} if "comm.train_timeout_seconds" in given.named else {}


def comm_mode(value: str, given: Given) -> Overrides:
    """Simulate a rank."""
    if value == "fake_backend":
        return {"cluster": "simulated"}
    if value == "local_tensor":
        raise NoEquivalent("python -m titan.verify parity compares a layout with one process, on CPUs, with real ranks")
    return {}


def dump_folder(value: str, given: Given) -> Overrides:
    """Name the run's folder, where the file does."""
    return {"run.dir": value} if "job.dump_folder" in given.named else {}


# whether a note matters -----------------------------------------------------------------------------------------------


def always(value: Any, given: Given) -> bool:
    """Matter to every config."""
    return True


def never(value: Any, given: Given) -> bool:
    """Matter to a reader of the table alone."""
    return False


def if_set(value: Any, given: Given) -> bool:
    """Matter where the option is on."""
    return bool(value)


def has_cp(value: Any, given: Given) -> bool:
    """Matter where sequences are shared."""
    return given["parallelism.context_parallel_degree"] > 1


def has_larger_pieces(value: Any, given: Given) -> bool:
    """Matter where a pipeline's pieces have more than one row."""
    return given["parallelism.pipeline_parallel_degree"] > 1 and value != 1
