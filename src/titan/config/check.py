"""Every rule that spans more than one key, one function each, all problems reported together.

A rule takes the resolved config and yields problems. It reads files at most to see that they are there; it never
imports torch and never starts anything. So the same rules hold on a laptop, on a login node and in a notebook.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from pathlib import Path

from titan.config.degrees import (
    CPU_HEAD_MULTIPLE,
    Machine,
    compiles_for_cpu,
    data_degree,
    has_ring,
    model_modules,
    pipeline_microbatches,
    plan_stages,
    resolve_config,
    stages_of_ranks,
    world_size,
)
from titan.config.held_out import check_validation
from titan.config.initial_load import check_initial_load
from titan.config.keys import default_of, find_key, flatten, override
from titan.config.schedule_file import read_schedule
from titan.config.schema import (
    ActivationCheckpointMode,
    Attention,
    CheckpointConfig,
    CheckpointContent,
    CheckpointMode,
    ClusterConfig,
    ClusterKind,
    CompileMode,
    ContextMethod,
    Device,
    Dtype,
    Float8Recipe,
    OnSpike,
    RecordFormat,
    TitanConfig,
    TokenizerKind,
    WandbMode,
)
from titan.config.sources import check_data, sources_of
from titan.config.tokenizer_files import guess_kind, read_json
from titan.config.tracking import has_wandb_key
from titan.config.vocabulary import check_fingerprint, count_tokens
from titan.errors import ConfigError, Problem

Rule = Callable[[TitanConfig], Iterator[Problem]]


def check_config(config: TitanConfig, machine: Machine) -> TitanConfig:
    """Fill in what was left open and apply every rule.

    Returns:
        The resolved config, ready to be frozen.

    Raises:
        ConfigError: With all problems found.
    """
    problems = [problem for rule in RULES_BEFORE for problem in rule(config)]
    resolved, open_problems = resolve_config(config, machine)
    problems += open_problems
    layout_is_known = not problems
    problems += [problem for rule in RULES for problem in rule(resolved)]
    if layout_is_known:
        problems += [problem for rule in RULES_OF_LAYOUT for problem in rule(resolved)]
    if problems:
        raise ConfigError(problems)
    return resolved


def _at_least(config: TitanConfig, bounds: dict[str, float]) -> Iterator[Problem]:
    for key, least in bounds.items():
        group, name = key.split(".")
        value = getattr(getattr(config, group), name)
        if value is not None and value < least:
            yield Problem(f"{key} = {value} is below {least}", suggestion=f"{key}={least}")


def check_counts(config: TitanConfig) -> Iterator[Problem]:
    """Counts are positive, and so is what is divided by."""
    yield from _at_least(
        config,
        {
            **{f"model.{n}": 1 for n in ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size")},
            "model.max_seq_len": 1,
            "model.norm_eps": 0,
            "training.steps": 1,
            "training.seq_len": 1,
            "training.local_batch_size": 1,
            "training.seed": 0,
            "training.max_grad_norm": 0,
            "training.gc_interval": 1,
            "training.loss_chunk_size": -1,
            "cluster.timeout_seconds": 1,
            "cluster.grace_seconds": 1,
            "cluster.cpus_per_task": 1,
            "cluster.max_requeues": 0,
            "cluster.array_parallelism": 1,
            "cluster.simulated_steps": 0,
            "parallelism.pp_stages_per_rank": 1,
            "parallelism.pp_less_first": 0,
            "parallelism.pp_less_last": 0,
            "data.num_workers": 0,
            "data.prepare_workers": 1,
            "optimizer.lr": 0,
            "optimizer.weight_decay": 0,
            "lr_scheduler.warmup_steps": 0,
            "activation_checkpoint.every": 1,
            "checkpoint.interval": 1,
            "checkpoint.interval_minutes": 0,
            "checkpoint.keep_latest": 0,
            "checkpoint.keep_every": 0,
            "checkpoint.max_failures": 1,
            "checkpoint.retry_seconds": 0,
            "fault_tolerance.max_spikes": 0,
            "fault_tolerance.spike_grad_norm": 0,
            "checkpoint.load_step": -1,
            "fault_tolerance.step_timeout_seconds": 0,
            "fault_tolerance.first_step_timeout_seconds": 0,
            "fault_tolerance.save_timeout_seconds": 0,
            "metrics.log_every": 1,
            "validation.interval": 0,
            "profiling.start_step": 2,
            "profiling.steps": 1,
        },
    )


def check_numbers(config: TitanConfig) -> Iterator[Problem]:
    """Numbers are finite, and the rotary frequencies can be computed."""
    for key, value in flatten(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            known = find_key(key)
            default = default_of(known) if known is not None else None
            yield Problem(f"{key} = {value} is not a finite number", suggestion=f"{key}={default or '...'}")
    model, scaling = config.model, config.model.rope_scaling
    # without eps, a word that no batch has held yet would be moved by 0/0
    positive = {"model.rope_theta": model.rope_theta, "optimizer.eps": config.optimizer.eps}
    if scaling is not None:
        positive |= flatten(scaling, "model.rope_scaling")
        if scaling.low_freq_factor >= scaling.high_freq_factor:
            yield Problem(
                f"model.rope_scaling.low_freq_factor = {scaling.low_freq_factor} is not below "
                f"high_freq_factor = {scaling.high_freq_factor}",
                "Between the two, stretched and kept frequencies blend.",
                "model.rope_scaling.low_freq_factor=1 model.rope_scaling.high_freq_factor=4",
            )
    for key, value in positive.items():
        if value <= 0:
            yield Problem(f"{key} = {value} is not positive", suggestion=f"{key}={1e-8 if 'eps' in key else 1}")


def check_run_directory(config: TitanConfig) -> Iterator[Problem]:
    """There is a name for the folder that everything goes into."""
    if not config.run.dir.strip():
        yield Problem("run.dir is empty", suggestion="run.dir=runs/NAME")


def check_shares(config: TitanConfig) -> Iterator[Problem]:
    """Shares lie between 0 and 1."""
    for key, value, include_one in (
        ("optimizer.beta1", config.optimizer.beta1, False),
        ("optimizer.beta2", config.optimizer.beta2, False),
        ("lr_scheduler.decay_ratio", config.lr_scheduler.decay_ratio, True),
        ("lr_scheduler.min_lr_factor", config.lr_scheduler.min_lr_factor, True),
    ):
        if value is not None and (value < 0 or value > 1 or (value == 1 and not include_one)):
            bound = "from 0 to 1" if include_one else "from 0 to below 1"
            yield Problem(f"{key} = {value} is not a share", f"It lies {bound}.", f"{key}=0.9")


def check_heads(config: TitanConfig) -> Iterator[Problem]:
    """Heads divide the width, and kv heads divide query heads."""
    model = config.model
    if min(model.n_heads, model.n_kv_heads, model.dim) < 1:
        return
    if model.dim % model.n_heads or (model.dim // model.n_heads) % 2:
        allowed = [n for n in _divisors(model.dim) if (model.dim // n) % 2 == 0]
        if allowed:
            why = f"Rotary embeddings turn pairs of numbers. Allowed here: {_listed(allowed)}."
            suggestion = f"model.n_heads={_nearest(allowed, model.n_heads)}"
        else:
            why = "Rotary embeddings turn pairs of numbers, which an odd width has not."
            pairs = 2 * model.n_heads
            suggestion = f"model.dim={max(1, round(model.dim / pairs)) * pairs}"
        what = f"model.n_heads = {model.n_heads} does not divide model.dim = {model.dim} into even heads"
        yield Problem(what, why, suggestion)
    if model.n_heads % model.n_kv_heads:
        allowed = _divisors(model.n_heads)
        yield Problem(
            f"model.n_kv_heads = {model.n_kv_heads} does not divide model.n_heads = {model.n_heads}",
            f"Each key and value head serves the same number of query heads. Allowed here: {_listed(allowed)}.",
            f"model.n_kv_heads={_nearest(allowed, model.n_kv_heads)}",
        )


def check_sequence(config: TitanConfig) -> Iterator[Problem]:
    """The rows fit the model's context."""
    if config.training.seq_len > config.model.max_seq_len:
        yield Problem(
            f"training.seq_len = {config.training.seq_len} exceeds model.max_seq_len = {config.model.max_seq_len}",
            f"model={config.model.name} was made for at most that many tokens.",
            f"training.seq_len={config.model.max_seq_len}   or raise model.max_seq_len",
        )


def check_batch_is_meant(config: TitanConfig) -> Iterator[Problem]:
    """A global batch is -1 or positive."""
    rows = config.training.global_batch_size
    if rows == 0 or rows < -1:
        yield Problem(
            f"training.global_batch_size = {rows} is not a number of rows",
            "-1 stands for one micro-batch a data rank.",
            "training.global_batch_size=-1",
        )


def check_global_batch(config: TitanConfig) -> Iterator[Problem]:
    """The global batch is a whole number of micro-batches on every data rank."""
    training, data_ranks = config.training, data_degree(config.parallelism)
    rows = training.local_batch_size * data_ranks
    if training.global_batch_size % rows:
        near = max(rows, round(training.global_batch_size / rows) * rows)
        yield Problem(
            f"training.global_batch_size = {training.global_batch_size} is not a multiple of {rows} rows",
            f"training.local_batch_size {training.local_batch_size} x {data_ranks} data ranks = {rows}.",
            f"training.global_batch_size={near}",
        )


def check_tensor_parallel(config: TitanConfig) -> Iterator[Problem]:
    """Every tensor-parallel rank gets the same whole share."""
    model, tp = config.model, config.parallelism.tp
    sizes = {"n_kv_heads": model.n_kv_heads, "ffn_dim": model.ffn_dim, "vocab_size": model.vocab_size}
    allowed = [n for n in _divisors(model.n_kv_heads) if not any(size % n for size in sizes.values())]
    for name, size in sizes.items():
        if size % tp:
            yield Problem(
                f"parallelism.tp = {tp} does not divide model.{name} = {size}   (model={model.name})",
                f"Each tensor-parallel rank needs a whole share. Allowed here: {_listed(allowed)}.",
                f"parallelism.tp={_nearest(allowed, tp)}",
            )


def check_sequence_shares(config: TitanConfig) -> Iterator[Problem]:
    """Every rank that shares a sequence gets the same whole share of it."""
    settings, seq_len = config.parallelism, config.training.seq_len
    parts = settings.cp * (2 if settings.cp > 1 and settings.cp_head_tail else 1)
    reason = f"cp {settings.cp}" + (" x 2 chunks" if parts > settings.cp else "")
    if settings.tp > 1 and settings.sequence_parallel:
        parts *= settings.tp
        reason += f" x tp {settings.tp}"
    if seq_len % parts:
        yield Problem(
            f"training.seq_len = {seq_len} is not a multiple of {parts}",
            f"The sequence is cut over {reason}.",
            f"training.seq_len={max(1, round(seq_len / parts)) * parts}",
        )
    if settings.cp > 1 and settings.cp_method is ContextMethod.all_to_all:
        heads = config.model.n_kv_heads // settings.tp
        if heads % settings.cp:
            yield Problem(
                f"parallelism.cp = {settings.cp} does not divide the {heads} kv heads of a rank",
                "parallelism.cp_method=all_to_all gives each rank whole heads.",
                "parallelism.cp_method=allgather",
            )


def check_ring_is_eager(config: TitanConfig) -> Iterator[Problem]:
    """torch.compile cannot trace the ring's point-to-point exchange."""
    if has_ring(config.parallelism) and config.compile.enable:
        yield Problem(
            "parallelism.cp_method = ring together with compile.enable = true",
            "torch.compile cannot trace point-to-point exchanges.",
            "compile=none   or  parallelism.cp_method=allgather",
        )


def check_pipeline(config: TitanConfig) -> Iterator[Problem]:
    """Every stage has something to do, and the schedule has micro-batches to work with."""
    settings = config.parallelism
    if settings.pp == 1:
        for key in ("pp_modules", "pp_schedule_csv"):
            if getattr(settings, key) is not None:
                yield Problem(
                    f"parallelism.{key} is set, but parallelism.pp = 1",
                    "There is no pipeline to share the model out to.",
                    "parallelism.pp=2",
                )
        return
    try:
        ranks = stages_of_ranks(settings)
    except ConfigError as error:
        yield from error.problems
        return
    if len(ranks) != settings.pp:
        yield Problem(
            f"parallelism.pp = {settings.pp}, but {settings.pp_schedule_csv} is for {len(ranks)} ranks",
            "It has one line for each.",
            f"parallelism.pp={len(ranks)}",
        )
        return
    yield from _check_stages(config, sum(map(len, ranks)))
    yield from _check_pipeline_microbatches(config)


def _check_stages(config: TitanConfig, stages: int) -> Iterator[Problem]:
    settings, n_layers = config.parallelism, config.model.n_layers
    schedule = settings.pp_schedule_csv or settings.pp_schedule.name
    if settings.pp_modules is None:
        try:
            plan_stages(n_layers, stages, settings.pp_less_first, settings.pp_less_last)
        except ValueError:
            yield Problem(
                f"{n_layers} blocks do not fill {stages} pipeline stages ({schedule})",
                "Every stage needs a block; the first and the last have fewer, by pp_less_first and pp_less_last.",
                f"parallelism.pp={max(1, settings.pp // 2)}   or  "
                "parallelism.pp_less_first=0 parallelism.pp_less_last=0",
            )
        return
    if len(settings.pp_modules) != stages or not all(settings.pp_modules):
        yield Problem(
            f"parallelism.pp_modules has {sum(map(bool, settings.pp_modules))} stages with modules, "
            f"but {schedule} with pp {settings.pp} needs {stages}",
            suggestion="parallelism.pp_modules=null   to share them out evenly",
        )
    given, wanted = [name for stage in settings.pp_modules for name in stage], model_modules(n_layers)
    if given != wanted:
        missing = [name for name in wanted if name not in given]
        unknown = [name for name in given if name not in wanted]
        twice = sorted({name for name in given if given.count(name) > 1})
        found = [
            f"{word}: {', '.join(names[:6])}"
            for word, names in (("missing", missing), ("unknown", unknown), ("twice", twice))
            if names
        ]
        yield Problem(
            "parallelism.pp_modules does not name every module once and in order",
            ("; ".join(found) or "the order is another") + f". The order: {wanted[0]}, {wanted[1]}, ..., norm, output.",
            "parallelism.pp_modules=null   to share them out evenly",
        )


def _check_pipeline_microbatches(config: TitanConfig) -> Iterator[Problem]:
    settings, rows = config.parallelism, config.training.local_batch_size
    schedule = settings.pp_schedule.name
    pieces = pipeline_microbatches(config)
    # PyTorch wants one for every stage of DualPipeV, of which each rank has two
    least = 2 * settings.pp if schedule == "DualPipeV" else settings.pp
    if pieces < 1 or rows % pieces:
        yield Problem(
            f"parallelism.pp_microbatches = {pieces} does not divide training.local_batch_size = {rows}",
            f"Each is a whole number of rows. Allowed here: {_listed(_divisors(rows))}.",
            f"parallelism.pp_microbatches={rows}",
        )
    elif settings.pp_schedule_csv is not None:
        wanted = read_schedule(settings.pp_schedule_csv).microbatches
        if pieces != wanted:
            yield Problem(
                f"{pieces} pipeline microbatches, but {settings.pp_schedule_csv} is for {wanted}",
                "By default every row of a micro-batch is one.",
                f"training.local_batch_size={wanted}",
            )
    elif pieces < least or (schedule not in ("GPipe", "1F1B") and pieces % settings.pp):
        rule = f"at least {least}" if schedule in ("GPipe", "1F1B") else f"a multiple of {settings.pp}"
        rule += f", and at least {least}" * (schedule == "DualPipeV")
        enough = settings.pp * max(least // settings.pp, -(-pieces // settings.pp))
        yield Problem(
            f"{pieces} pipeline microbatches are too few or uneven for pp {settings.pp} with {schedule}",
            f"{schedule} needs {rule}; by default every row of a micro-batch is one.",
            f"training.local_batch_size={enough}",
        )


def check_family(config: TitanConfig) -> Iterator[Problem]:
    """A model family is titan's, or looks like one that can be imported."""
    module, separator, attribute = config.model.family.partition(":")
    if config.model.family == "llama":
        return
    if not (separator and attribute.isidentifier() and module):
        yield Problem(
            f"model.family = {config.model.family} is no model family",
            "Families: llama, or one of your own as package.module:NAME.",
            "model.family=llama",
        )
    elif config.cluster.kind is not ClusterKind.slurm and not _is_module(module):
        yield Problem(
            f"model.family = {config.model.family}, but there is no module {module}",
            "The ranks look for it in the folder that the command is given in, on PYTHONPATH and among what is "
            "installed.",
            f"export PYTHONPATH=/folder/of/{module.partition('.')[0]}   or  model.family=llama",
        )


def _is_module(name: str) -> bool:
    """Whether a module can be found, without importing it or the packages that it is in."""
    first, *others = name.split(".")
    try:
        found = importlib.util.find_spec(first) or PathFinder.find_spec(first, [os.getcwd()])
        for part in others:
            if found is None or found.submodule_search_locations is None:
                return False
            found = PathFinder.find_spec(f"{found.name}.{part}", list(found.submodule_search_locations))
    except (ImportError, ValueError):  # of what is loaded already in some other way
        return True
    return found is not None


def check_tokenizer(config: TitanConfig) -> Iterator[Problem]:
    """The tokenizer can be read and its tokens fit the model's vocabulary."""
    kind, path = config.tokenizer.kind, config.tokenizer.path
    if kind in (TokenizerKind.bytes, TokenizerKind.llama3) and path is not None:
        guessed = guess_kind(Path(path)) or (TokenizerKind.tiktoken, path)
        yield Problem(
            f"tokenizer.path = {path} is set, but tokenizer={kind.name} "
            + ("reads no file" if kind is TokenizerKind.bytes else "reads the file that llama-models ships"),
            suggestion=f"tokenizer={guessed[0].name} tokenizer.path={guessed[1]}",
        )
        return
    try:
        tokens = count_tokens(config.tokenizer)
        check_fingerprint(config.tokenizer)
    except ConfigError as error:
        yield from error.problems
        return
    if tokens > config.model.vocab_size:
        yield Problem(
            f"tokenizer={config.tokenizer.kind.name} has {tokens:,} tokens, "
            f"but model.vocab_size = {config.model.vocab_size:,}",
            "Every token needs a row in the embedding.",
            f"model.vocab_size={tokens}",
        )
    sources = sources_of(config.data) | {"validation.data": config.validation.data}
    chats = [name for name, source in sources.items() if source is not None and source.format is RecordFormat.chat]
    if chats and kind is TokenizerKind.huggingface and read_json(path).chat_template is None:
        yield Problem(
            f"{chats[0]}.format = chat, but tokenizer.path = {path} has no chat template",
            "A tokenizer.json is written to in the form of its chat_template, in tokenizer_config.json or "
            "chat_template.jinja beside it.",
            f"tokenizer.path=/path/to/its/instruct/version   or  {chats[0]}.format=text",
        )


def check_float8(config: TitanConfig) -> Iterator[Problem]:
    """Float8 has hardware, or is emulated; its options have something to act on."""
    settings, recipe = config.float8, config.float8.recipe
    if "auto_filter_small_kn" in settings.filter_fqns:
        yield Problem(
            "float8.filter_fqns has auto_filter_small_kn, which is an option of its own",
            "TorchTitan has it among the names.",
            "float8.auto_filter_small_kn=true",
        )
    if settings.fsdp_all_gather and recipe is not Float8Recipe.tensorwise:
        yield Problem(
            f"float8.fsdp_all_gather = true, but float8={recipe.name}",
            "Only weights with one scale for the whole tensor can be cast before they are gathered.",
            "float8=tensorwise   or  float8.fsdp_all_gather=null",
        )
    elif settings.fsdp_all_gather and config.parallelism.cpu_offload:
        yield Problem(
            "float8.fsdp_all_gather = true, but parallelism.cpu_offload = true",
            "Shards in the CPU's memory go to the GPU as they are.",
            "float8.fsdp_all_gather=false   or  parallelism.cpu_offload=false",
        )
    if settings.precompute_scales and not settings.fsdp_all_gather:
        yield Problem(
            "float8.precompute_scales = true, but weights are not gathered in float8",
            "A weight that is gathered first has its scale from the rank that multiplies by it.",
            "float8.precompute_scales=null",
        )
    if recipe is Float8Recipe.none:
        return
    if settings.auto_filter_small_kn and recipe is Float8Recipe.rowwise_with_gw_hp:
        yield Problem(
            f"float8.auto_filter_small_kn = true, but torchao has no such rule for float8={recipe.name}",
            suggestion="float8.auto_filter_small_kn=false   or  float8=rowwise",
        )
    if config.cluster.device is Device.cpu and not config.float8.emulate:
        yield Problem(
            f"float8={recipe.name} needs a GPU with float8 units (H100 or later), but cluster.device = cpu",
            "Emulation rounds as float8 does, but is slower than float32.",
            "float8=none   or  float8.emulate=true",
        )


def check_float8_layout(config: TitanConfig) -> Iterator[Problem]:
    """There are shards to gather in float8, and as many positions as its products want."""
    settings, parallelism, training = config.float8, config.parallelism, config.training
    if settings.fsdp_all_gather and parallelism.dp_shard * parallelism.cp == 1:
        yield Problem(
            "float8.fsdp_all_gather = true, but dp_shard x cp = 1",
            "Every rank has the weights that it multiplies by, so there is nothing to gather.",
            "float8.fsdp_all_gather=null   or  parallelism.dp_shard=-1",
        )
    if settings.emulate or settings.recipe not in (Float8Recipe.tensorwise, Float8Recipe.rowwise):
        return
    pieces = pipeline_microbatches(config) if parallelism.pp > 1 else 1
    rows, tokens = training.local_batch_size // pieces, training.seq_len // parallelism.cp
    if rows * tokens % 16:
        yield Problem(
            f"{rows} rows x {tokens} tokens = {rows * tokens} positions of a micro-batch on a rank are no multiple of "
            f"16, which float8={settings.recipe.name} needs",
            "The weights' gradients are float8 products over the positions.",
            f"training.seq_len={16 * parallelism.cp * max(1, round(tokens / 16))}   or  float8=rowwise_with_gw_hp",
        )


def check_compiler(config: TitanConfig) -> Iterator[Problem]:
    """Compiling for the CPU needs a C++ compiler."""
    on_cpu, has_compiler = config.cluster.device is Device.cpu, shutil.which("g++") is not None
    if config.training.attention is Attention.cpu and on_cpu and not has_compiler:
        yield Problem(
            "training.attention = cpu, but there is no C++ compiler (g++) on the PATH",
            "titan's own kernel is compiled where it runs.",
            "training.attention=default",
        )
    if compiles_for_cpu(config) and not has_compiler:
        yield Problem(
            "compile.enable = true on a CPU, but there is no C++ compiler (g++) on the PATH",
            suggestion="compile=none",
        )
    settings = config.compile
    if settings.mode is not CompileMode.default and settings.backend != "inductor":
        yield Problem(
            f"compile.mode = {settings.mode.name}, but compile.backend = {settings.backend} has no modes",
            suggestion="compile.mode=default   or  compile.backend=inductor",
        )
    if settings.optimizer and not settings.enable:
        yield Problem(
            "compile.optimizer = true, but compile.enable = false",
            "The optimizer's update is compiled beside the blocks, never alone.",
            "compile=inductor   or  compile.optimizer=false",
        )


_CUDA_ONLY = {
    Attention.cudnn: "cuDNN is a library of CUDA's.",
    Attention.efficient: "PyTorch has it for CUDA only.",
    Attention.flash3: "FlashAttention 3 is for Hopper GPUs.",
    Attention.flex: "FlexAttention has no backward pass on a CPU.",
}
_SIXTEEN_BITS = (Attention.flash, Attention.flash3, Attention.cudnn)
_ONLY_CAUSAL = (Attention.flash, Attention.flash3)
_IN_A_RING = (Attention.default, Attention.flash, Attention.flash3)


def check_attention(config: TitanConfig) -> Iterator[Problem]:
    """The kernel of attention exists for the device, and can do what the data and the layout ask of it."""
    training, attention = config.training, config.training.attention
    key, on_cpu = f"training.attention = {attention.name}", config.cluster.device is Device.cpu
    is_ring = has_ring(config.parallelism)
    if on_cpu and attention in _CUDA_ONLY:
        yield Problem(
            f"{key}, but cluster.device = cpu",
            _CUDA_ONLY[attention],
            "training.attention=default   (on a CPU there are cpu, flash and math)",
        )
        return
    if attention is Attention.cpu and not on_cpu:
        yield Problem(
            f"{key}, but cluster.device = cuda",
            "It is titan's own kernel, for CPUs.",
            "training.attention=default",
        )
        return
    head_size = config.model.dim // max(1, config.model.n_heads)
    if attention is Attention.cpu and head_size % CPU_HEAD_MULTIPLE != 0:
        yield Problem(
            f"{key}, but a head has {head_size} numbers (model.dim / model.n_heads)",
            f"It computes with {CPU_HEAD_MULTIPLE} numbers at a time.",
            "training.attention=default",
        )
    if attention is Attention.flex and not config.data.mask_documents:
        yield Problem(
            f"{key}, but data.mask_documents = false",
            "It is there to skip what documents do not see of each other; the plain causal mask the others know.",
            "training.attention=default   or  data.mask_documents=true",
        )
    if is_ring and attention not in _IN_A_RING:
        yield Problem(
            f"{key} together with parallelism.cp_method = ring",
            "The ring merges results by their log-sum-exp, which it has from flash.",
            "training.attention=default   or  parallelism.cp_method=allgather",
        )
    if not on_cpu and attention in _SIXTEEN_BITS and training.param_dtype is Dtype.float32:
        yield Problem(
            f"{key}, but training.param_dtype = float32",
            "On CUDA it computes with 16 bits only.",
            "training.param_dtype=bfloat16   or  training.attention=efficient",
        )
    if not on_cpu and attention in _ONLY_CAUSAL and config.data.mask_documents:
        yield Problem(
            f"{key}, but data.mask_documents = true",
            "On CUDA it knows no mask but the causal one.",
            f"training.attention={'default' if is_ring else 'flex'}   or  data.mask_documents=false",
        )
    if attention is Attention.cudnn and training.deterministic:
        yield Problem(
            f"{key}, but training.deterministic = true",
            "Its backward pass does not give the same bits every time.",
            "training.attention=flash   or  training.deterministic=false",
        )
    is_elsewhere = config.cluster.kind is not ClusterKind.local  # where the packages may be others
    if attention is Attention.flash3 and not is_elsewhere and importlib.util.find_spec("flash_attn_interface") is None:
        yield Problem(
            f"{key}, but the package flash_attn_3 is not installed",
            "PyTorch takes its kernels from the module flash_attn_interface, which is not here.",
            "training.attention=cudnn   (as new, on Hopper)   or  training.attention=default",
        )


def check_cuda_graphs(config: TitanConfig) -> Iterator[Problem]:
    """A CUDA graph replays the same work on the same memory, one micro-batch after the other."""
    settings, is_on_cuda = config.compile, config.cluster.device is Device.cuda
    if not settings.enable or not settings.mode.has_cuda_graphs:
        return
    what = f"compile.mode = {settings.mode.name} takes CUDA graphs"
    if not is_on_cuda and settings.mode is CompileMode.reduce_overhead:
        yield Problem(f"{what}, but cluster.device = {config.cluster.device.name}", suggestion="compile.mode=default")
    if not is_on_cuda:
        return
    without = "compile.mode=default   or  compile.mode=max_autotune_no_cudagraphs"
    if config.parallelism.pp > 1:
        yield Problem(
            f"{what}, but parallelism.pp = {config.parallelism.pp}",
            "A pipeline has several micro-batches in hand at once, and a graph keeps the activations of one.",
            without,
        )
    if config.parallelism.cpu_offload:
        yield Problem(
            f"{what}, but parallelism.cpu_offload = true",
            "Weights that come from the CPU's memory lie in another place every time.",
            without,
        )


def check_activation_checkpoint(config: TitanConfig) -> Iterator[Problem]:
    """every_nth leaves some block to act on."""
    settings = config.activation_checkpoint
    if settings.mode is ActivationCheckpointMode.every_nth and settings.every > config.model.n_layers:
        yield Problem(
            f"activation_checkpoint.every = {settings.every} exceeds model.n_layers = {config.model.n_layers}",
            suggestion="activation_checkpoint.every=2",
        )


def check_memory_budget(config: TitanConfig) -> Iterator[Problem]:
    """A budget for activations is a share, and there is a compiler to keep to it."""
    settings = config.activation_checkpoint
    if settings.mode is not ActivationCheckpointMode.memory_budget:
        return
    if not 0 <= settings.memory_budget <= 1:
        yield Problem(
            f"activation_checkpoint.memory_budget = {settings.memory_budget} is not a share",
            "It lies from 0 (keep what full keeps) to 1 (keep everything).",
            "activation_checkpoint.memory_budget=0.5",
        )
    if not config.compile.enable:
        yield Problem(
            "activation_checkpoint = memory_budget, but compile.enable = false",
            "It is the compiler that chooses what to keep.",
            "compile=inductor   or  activation_checkpoint=selective",
        )


def check_async_tensor_parallel(config: TitanConfig) -> Iterator[Problem]:
    """Overlapping exchanges with products takes the compiler, and memory that GPUs can reach of each other."""
    settings = config.parallelism
    if not settings.async_tp:
        return
    for is_met, what, suggestion in (
        (settings.tp > 1, f"parallelism.tp = {settings.tp} exchanges nothing", "parallelism.tp=2"),
        (
            settings.sequence_parallel,
            "it overlaps what sequence parallelism exchanges",
            "parallelism.sequence_parallel=true",
        ),
        (config.compile.enable, "compile.enable = false, and it is the compiler that overlaps", "compile=inductor"),
        (
            config.cluster.device is Device.cuda,
            f"cluster.device = {config.cluster.device.name}, and its kernels are for CUDA",
            "parallelism.async_tp=false",
        ),
    ):
        if not is_met:
            yield Problem(f"parallelism.async_tp = true, but {what}", suggestion=suggestion)


def check_checkpoint(config: TitanConfig) -> Iterator[Problem]:
    """What is asked of checkpoints can be done together."""
    settings, nothing = config.checkpoint, CheckpointConfig(mode=CheckpointMode["sync"])
    if settings.mode is CheckpointMode["disabled"]:
        for key in ("load_step", "save_initial", "interval_minutes", "keep_every", "last_content"):
            value = getattr(settings, key)
            if value != getattr(nothing, key):
                yield Problem(
                    f"{override(f'checkpoint.{key}', flatten(value)[''])}, but checkpoint=disabled saves and resumes "
                    "nothing",
                    suggestion="checkpoint=async",
                )
        if config.fault_tolerance.on_spike is OnSpike.rollback:
            yield Problem(
                "fault_tolerance.on_spike = rollback, but checkpoint=disabled saves nothing to go back to",
                suggestion="checkpoint=async   or  fault_tolerance.on_spike=skip",
            )
    if settings.last_dtype is Dtype.bfloat16 and settings.last_content is CheckpointContent.all:
        yield Problem(
            f"checkpoint.last_dtype = {settings.last_dtype.name}, but checkpoint.last_content = all",
            "A run goes on from the weights in the format of training.",
            "checkpoint.last_content=weights",
        )


def check_simulated(config: TitanConfig) -> Iterator[Problem]:
    """The rank to simulate is one of the cluster's."""
    cluster = config.cluster
    if cluster.kind is not ClusterKind.simulated:
        for key in ("simulated_rank", "simulated_steps"):
            if getattr(cluster, key):
                yield Problem(
                    f"cluster.{key} = {getattr(cluster, key)}, but cluster={cluster.kind.name} starts every rank",
                    suggestion="cluster=simulated",
                )
    elif not 0 <= cluster.simulated_rank < world_size(cluster):
        yield Problem(
            f"cluster.simulated_rank = {cluster.simulated_rank} is none of the {world_size(cluster)} ranks",
            suggestion=f"cluster.simulated_rank={world_size(cluster) - 1}   (the last)",
        )


ONLY_SLURM = (
    *("partition", "account", "qos", "reservation", "constraint", "time", "exclusive", "cpus_per_task", "memory"),
    *("setup", "python", "container_image", "container_mounts", "sbatch", "srun", "max_requeues"),
    *("array_parallelism", "wait", "print_script", "inside_job"),
)
"""Keys of the cluster that say nothing to any other kind."""

OWN_ARGUMENTS = {
    **{name: f"cluster.{name}" for name in ("partition", "account", "qos", "reservation", "constraint", "time")},
    "exclusive": "cluster.exclusive",
    "cpus-per-task": "cluster.cpus_per_task",
    "mem": "cluster.memory",
    "nodes": "cluster.nodes",
    "ntasks-per-node": "cluster.devices_per_node",
    "signal": "cluster.grace_seconds",
    "export": "cluster.environment",
    "container-image": "cluster.container_image",
    "container-mounts": "cluster.container_mounts",
    "wait": "cluster.wait",
    "job-name": "run.name",
    **dict.fromkeys(("ntasks", "array", "output", "error", "open-mode", "requeue", "no-requeue", "wrap"), ""),
    **dict.fromkeys(("kill-on-bad-exit", "parsable", "test-only", "quiet"), ""),
}
"""Arguments of sbatch and srun that titan sets, each with the key that decides it, if one does."""

_DURATION = re.compile(r"(?:(?P<days>\d+)-)?(?P<hours>\d+)(?::(?P<minutes>[0-5]\d)(?::(?P<seconds>[0-5]\d))?)?")
_SECRET = re.compile(r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|KEY|APIKEY|CREDENTIALS?)(?:_|$)", re.IGNORECASE)


def check_slurm(config: TitanConfig) -> Iterator[Problem]:
    """What is asked of SLURM can be asked of it, and of nothing else."""
    cluster, nothing = config.cluster, ClusterConfig()
    if cluster.kind is not ClusterKind.slurm:
        for key in ONLY_SLURM:
            value = getattr(cluster, key)
            if value != getattr(nothing, key):
                yield Problem(
                    f"{override(f'cluster.{key}', value)}, but cluster={cluster.kind.name} asks nothing of SLURM",
                    suggestion="cluster=slurm",
                )
        return
    if cluster.time is not None:
        yield from _check_time(cluster.time, cluster.grace_seconds)
    if cluster.memory is not None and not re.fullmatch(r"\d+[KMGT]?", cluster.memory):
        yield Problem(
            f"cluster.memory = {cluster.memory} is not an amount",
            "A number of MB, or with K, M, G or T behind it.",
            "cluster.memory=500G   or  cluster.memory=0   for all of a node",
        )
    for group in ("sbatch", "srun"):
        for name in getattr(cluster, group):
            plain = name.lstrip("-").partition("=")[0].replace("_", "-")
            if plain in OWN_ARGUMENTS:
                key = OWN_ARGUMENTS[plain]
                yield Problem(
                    f"cluster.{group}.{name} is set, but titan sets --{plain} itself",
                    suggestion=f"{key}=..." if key else f"leave cluster.{group}.{name} out",
                )
            elif plain != name:
                yield Problem(
                    f"cluster.{group}.{name} is no argument's name",
                    "Names have no dashes in front, and = comes between name and value.",
                    f"+cluster.{group}.{plain}=...",
                )
    if "%" in config.run.dir:
        yield Problem(f"run.dir = {config.run.dir} has a %, which SLURM would replace", suggestion="run.dir=runs/NAME")
    if cluster.container_image is not None and cluster.python is None:
        yield Problem(
            "cluster.container_image is set, but not which Python is in it",
            "The one of this machine is not there.",
            "cluster.python=python3",
        )
    if cluster.container_mounts and cluster.container_image is None:
        yield Problem(
            "cluster.container_mounts is set, but there is no container to mount into",
            suggestion="cluster.container_image=...",
        )


def _check_time(text: str, grace_seconds: int) -> Iterator[Problem]:
    found = _DURATION.fullmatch(text)
    parts = {name: int(number or 0) for name, number in found.groupdict().items()} if found else {}
    if found is None or (":" not in text and "-" not in text) or (text.count(":") == 1 and "-" not in text):
        yield Problem(
            f"cluster.time = {text} is not a time that can be read in one way only",
            "SLURM takes 90 for minutes and 1:30 for minutes and seconds; without quotes, YAML takes 1:30:00 for 5400.",
            "cluster.time=1:30:00   (hours:minutes:seconds)   or  cluster.time=2-00   (days-hours)",
        )
        return
    seconds = ((parts["days"] * 24 + parts["hours"]) * 60 + parts["minutes"]) * 60 + parts["seconds"]
    if seconds <= grace_seconds:
        yield Problem(
            f"cluster.time = {text} leaves no time to train: cluster.grace_seconds = {grace_seconds}",
            "So long before its end a job is told to save and to make room.",
            "cluster.time=1:00:00",
        )


def check_environment(config: TitanConfig) -> Iterator[Problem]:
    """Secrets stay in the environment: the config is written to disk and shown in logs."""
    cluster = config.cluster
    for line in cluster.setup:
        for name in re.findall(r"(\w+)=", line):
            if _SECRET.search(name):
                yield _secret(f"cluster.setup sets {name}, which", name)
    for name in cluster.environment:
        if _SECRET.search(name):
            yield _secret(f"cluster.environment.{name}", name)
        elif not re.fullmatch(r"[A-Za-z_]\w*", name):
            yield Problem(
                f"cluster.environment.{name} is not the name of a variable", suggestion="+cluster.environment.NAME=..."
            )


def _secret(what: str, name: str) -> Problem:
    return Problem(
        f"{what} looks like a secret, and a config is written to disk",
        "What the shell exports reaches the ranks without being written anywhere.",
        f"export {name}=...   in the shell, and leave it out here",
    )


def check_profiling(config: TitanConfig) -> Iterator[Problem]:
    """What is profiled comes before the run's end, and is there to be recorded."""
    settings = config.profiling
    last = settings.start_step + settings.steps - 1
    if settings.memory_snapshot and config.cluster.device is Device.cpu:
        yield Problem(
            "profiling.memory_snapshot = true, but cluster.device = cpu",
            "PyTorch remembers who holds memory on CUDA only. memory_gib in metrics.jsonl is the process's peak here.",
            "profiling.memory_snapshot=false   or  profiling=trace   for the time",
        )
    if (settings.enable or settings.memory_snapshot) and last > config.training.steps:
        yield Problem(
            f"profiling looks at steps {config.profiling.start_step} to {last}, "
            f"but training.steps = {config.training.steps}",
            suggestion=f"profiling.start_step=2 profiling.steps={min(3, config.training.steps - 1)}"
            if config.training.steps > 1
            else "profiling=none",
        )


def check_metrics(config: TitanConfig) -> Iterator[Problem]:
    """The packages that metrics are sent through are here, and so is a key for Weights & Biases."""
    settings, wandb = config.metrics, config.metrics.wandb
    is_elsewhere = config.cluster.kind is not ClusterKind.local  # where the packages may be others
    if settings.tensorboard and not is_elsewhere and importlib.util.find_spec("tensorboard") is None:
        yield Problem(
            "metrics.tensorboard = true, but the package tensorboard is not installed",
            "PyTorch writes its files with it.",
            "pip install 'titan[tensorboard]'   or  metrics.tensorboard=false",
        )
    if not wandb.enable:
        return
    if not wandb.project.strip():
        yield Problem(
            "metrics.wandb.project is empty",
            "Weights & Biases lists every run in a project.",
            "metrics.wandb.project=titan",
        )
    if is_elsewhere:
        return
    if importlib.util.find_spec("wandb") is None:
        yield Problem(
            "metrics.wandb.enable = true, but the package wandb is not installed",
            suggestion="pip install wandb   or  metrics.wandb.enable=false",
        )
    if wandb.mode is WandbMode.online and not has_wandb_key():
        yield Problem(
            "metrics.wandb.enable = true, but there is no key for Weights & Biases",
            "It is taken from WANDB_API_KEY, or from where `wandb login` leaves it, and never from the config.",
            "export WANDB_API_KEY=...   or  wandb login   or  metrics.wandb.mode=offline",
        )


def check_preparation(config: TitanConfig) -> Iterator[Problem]:
    """What is to be tokenised is there, and what it is tokenised with; nothing else of the config is looked at."""
    yield from _at_least(config, {"data.prepare_workers": 1})
    yield from check_data(config)
    try:
        count_tokens(config.tokenizer)
    except ConfigError as error:
        yield from error.problems


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _nearest(allowed: list[int], value: int) -> int:
    return min(allowed, key=lambda n: (abs(n - value), n))


def _listed(numbers: list[int]) -> str:
    shown = ", ".join(str(n) for n in numbers[:12])
    return shown + (", ..." if len(numbers) > 12 else "")


RULES_BEFORE: tuple[Rule, ...] = (
    check_run_directory,
    check_counts,
    check_numbers,
    check_shares,
    check_batch_is_meant,
)
"""Rules on what was written, before anything is filled in."""

RULES: tuple[Rule, ...] = (
    check_family,
    check_heads,
    check_sequence,
    check_data,
    check_validation,
    check_tokenizer,
    check_float8,
    check_compiler,
    check_attention,
    check_cuda_graphs,
    check_activation_checkpoint,
    check_memory_budget,
    check_async_tensor_parallel,
    check_checkpoint,
    check_initial_load,
    check_profiling,
    check_metrics,
    check_slurm,
    check_environment,
)
"""Rules that hold for any layout."""

RULES_OF_LAYOUT: tuple[Rule, ...] = (
    check_tensor_parallel,
    check_sequence_shares,
    check_ring_is_eager,
    check_pipeline,
    check_float8_layout,
    check_simulated,
    check_global_batch,
)
"""Rules that need resolved degrees, so they wait until those are known to be right."""
