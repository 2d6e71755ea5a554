"""Every option of TorchTitan 0.2.2 beside titan's: the one table that the translation and the documentation read.

An option names the keys of titan that it may set. Most say the same in another word; a rule computes what is not said
word for word, and raises `NoEquivalent` for a value that titan has nothing for. The trap is the default: what a file
leaves out is TorchTitan's default there and would be titan's here, so the rules run over all options, not over those
of the file. Tests hold names and defaults against the package itself, and every rule against the keys it names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from titan.convert import torchtitan_rules as rules
from titan.convert.torchtitan_rules import Given, Overrides, Rule

VERSION = "0.2.2"
"""The version of TorchTitan whose options these are."""


@dataclass(frozen=True)
class Option:
    """One option of TorchTitan."""

    name: str
    """Dotted, as in a TOML file."""
    default: Any
    """What it is where a file does not name it."""
    keys: tuple[str, ...] = ()
    """The groups and keys of titan that it sets; none where there is no equivalent."""
    note: str = ""
    """What differs in meaning, or why there is no equivalent."""
    rule: Rule | None = None
    """What computes the overrides; None hands the value on to the one key."""
    kinds: tuple[type, ...] = ()
    """What TOML may hold for it; by default what the default is."""
    needs: str = ""
    """A switch of TorchTitan without which the option does nothing."""
    matters: Callable[[Any, Given], bool] | None = None
    """Whether the note concerns a config; None where it concerns those that name the option."""

    def accepts(self, value: object) -> bool:
        """Return whether a value of a TOML file is of the option's type."""
        kinds = self.kinds or (type(self.default),)
        if isinstance(value, bool):
            return bool in kinds
        return isinstance(value, kinds) or (float in kinds and isinstance(value, int))

    def is_noted(self, given: Given) -> bool:
        """Return whether the note says something about a config."""
        if not self.note or (self.needs and not given[self.needs]):
            return False
        value = given[self.name]
        if not self.keys:
            return self.name in given.named and value != self.default
        return self.name in given.named if self.matters is None else self.matters(value, given)

    def apply(self, given: Given) -> Overrides:
        """Return what the option's value is in titan.

        Raises:
            NoEquivalent: If titan has nothing for the value.
        """
        value = given[self.name]
        if self.rule is not None:
            return self.rule(value, given)
        return {self.keys[0]: value} if self.keys else {}


def _same(name: str, default: Any, key: str, note: str = "", **more: Any) -> Option:
    return Option(name, default, (key,), note, **more)


def _none(name: str, default: Any, why: str, **more: Any) -> Option:
    return Option(name, default, (), why, **more)


_MOE = "titan has no mixture of experts"
_FIXED = "titan writes into fixed folders of run.dir"
_FT = "TorchFT is not built in; titan.train resumes after a lost rank, on any number of ranks (docs/reliability.md)"
_NULL_OR_TEXT, _NULL_OR_INT = (str, type(None)), (int, type(None))
_AC_DEBUG = "titan's checkpointing is PyTorch's non-reentrant one, with its defaults"

# fmt: off
OPTIONS: tuple[Option, ...] = (
    _none("job.config_file", None, "the command line is the config; a recipe is a file in experiment/", kinds=(str,)),
    Option("job.dump_folder", "./outputs", ("run.dir",), rule=rules.dump_folder,
        note="one run alone: the same folder again resumes the run, and is refused to another one"),
    _none("job.description", "default job", "run.name is a name; it is in run.dir and in the log"),
    _none("job.print_config", False, "--cfg job prints the config and starts nothing"),
    _none("job.save_config_file", None, "<run.dir>/config.yaml always has it, with everything filled in", kinds=(str,)),
    _none("job.custom_config_module", "", "groups of your own are YAML files: --config-dir"),
    Option("profiling.enable_profiling", False, ("profiling", "profiling.start_step", "profiling.steps"),
        rule=rules.profiling, matters=rules.if_set,
        note="one stretch of steps, not one in every profile_freq; with a table of where the time went"),
    _none("profiling.save_traces_folder", "profile_traces", f"{_FIXED}: profiles/", needs="profiling.enable_profiling"),
    Option("profiling.profile_freq", 10, ("profiling.start_step",), rule=rules.elsewhere,
        needs="profiling.enable_profiling"),
    Option("profiling.profiler_active", 1, ("profiling.steps",), rule=rules.elsewhere,
        needs="profiling.enable_profiling"),
    _none("profiling.profiler_warmup", 3, "one step before the first is traced and thrown away",
        needs="profiling.enable_profiling"),
    Option("profiling.enable_memory_snapshot", False,
        ("profiling", "profiling.memory_snapshot", "profiling.start_step", "profiling.steps"), rule=rules.snapshot,
        matters=rules.if_set, note="one snapshot after the last of the steps, or when memory runs out"),
    _none("profiling.save_memory_snapshot_folder", "memory_snapshot", f"{_FIXED}: profiles/",
        needs="profiling.enable_memory_snapshot"),
    _same("metrics.log_freq", 10, "metrics.log_every"),
    _none("metrics.enable_tensorboard", False, "<run.dir>/metrics.jsonl has every number of every logged step"),
    _none("metrics.disable_color_printing", False, "titan prints no colours"),
    _none("metrics.save_tb_folder", "tb", f"{_FIXED}: metrics.jsonl", needs="metrics.enable_tensorboard"),
    _none("metrics.save_for_all_ranks", False, "numbers are of all ranks together; each rank's log is in logs/"),
    _none("metrics.enable_wandb", False, "<run.dir>/metrics.jsonl has every number of every logged step"),
    Option("model.name", "llama3", ("model",), rule=rules.model_name),
    Option("model.flavor", "debugmodel", ("model", "data.mask_documents"), rule=rules.flavor,
        matters=lambda value, given: value.startswith("debugmodel") or "_" in value,
        note="_flex and _varlen keep attention inside documents: data.mask_documents, and titan chooses the kernel; "
        "TorchTitan's debugmodel stretches rotary positions as Llama 3.1 does, llama3_debug does not"),
    Option("model.hf_assets_path", "./tests/assets/tokenizer", ("tokenizer", "tokenizer.path"), rule=rules.hf_assets,
        note="the tokenizer alone; weights of a Hugging Face folder are taken with checkpoint.initial_load"),
    Option("model.tokenizer_path", None, ("tokenizer", "tokenizer.path"), rule=rules.tokenizer, kinds=_NULL_OR_TEXT,
        note="a tokenizer.model is tokenizer=tiktoken, a folder tokenizer=huggingface"),
    Option("model.converters", [], ("float8",), rule=rules.converters),
    _none("model.print_after_conversion", False, "the start of a run says how many matrices are float8, and why not"),
    Option("optimizer.name", "AdamW", ("optimizer",), rule=rules.optimizer_name),
    _same("optimizer.lr", 8e-4, "optimizer.lr"),
    _same("optimizer.beta1", 0.9, "optimizer.beta1"),
    _same("optimizer.beta2", 0.95, "optimizer.beta2"),
    _same("optimizer.eps", 1e-8, "optimizer.eps"),
    Option("optimizer.weight_decay", 0.1,
        ("optimizer.weight_decay", "optimizer.decay_embeddings", "optimizer.decay_norms"), rule=rules.weight_decay,
        note="TorchTitan decays every parameter, titan by default matrices alone: decay_embeddings and decay_norms "
        "make it the same", matters=rules.if_set),
    _none("optimizer.implementation", "fused",
        "PyTorch's fused kernel wherever there is one; compile.optimizer=true compiles the update instead"),
    _none("optimizer.early_step_in_backward", False,
        "the step needs the norm of all gradients, and whether all are finite; parallelism.cpu_offload=true saves "
        "more memory"),
    Option("lr_scheduler.warmup_steps", 200, ("lr_scheduler", "lr_scheduler.warmup_steps"), rule=rules.warmup,
        note="TorchTitan shortens a warm-up that is longer than the run, and so it is shortened here",
        matters=lambda value, given: value > given["training.steps"]),
    Option("lr_scheduler.total_steps", None, ("lr_scheduler",), rule=rules.total_steps, kinds=_NULL_OR_INT),
    _same("lr_scheduler.decay_ratio", None, "lr_scheduler.decay_ratio", kinds=(float, type(None))),
    _same("lr_scheduler.decay_type", "linear", "lr_scheduler.decay_type"),
    _same("lr_scheduler.min_lr_factor", 0.0, "lr_scheduler.min_lr_factor"),
    Option("training.dataset", "c4_test", ("data", "data.path", "data.dataset", "data.subset", "data.streaming"),
        rule=rules.dataset,
        note="titan shuffles, with the seed; the rows of a step are the same on every layout, but not TorchTitan's",
        matters=rules.always),
    Option("training.dataset_path", None, ("data.path", "data.dataset"), rule=rules.elsewhere, kinds=_NULL_OR_TEXT),
    _same("training.local_batch_size", 8, "training.local_batch_size"),
    _same("training.global_batch_size", -1, "training.global_batch_size",
        "rows of a step in both; later versions of TorchTitan count tokens", matters=lambda value, given: value != -1),
    _same("training.seq_len", 2048, "training.seq_len"),
    _same("training.max_norm", 1.0, "training.max_grad_norm", kinds=(float,)),
    _same("training.steps", 10000, "training.steps"),
    _same("training.enable_cpu_offload", False, "parallelism.cpu_offload"),
    Option("training.dtype", "float32", ("training.param_dtype",), rule=rules.dtype),
    Option("training.mixed_precision_param", "bfloat16", ("training.param_dtype",), rule=rules.param_dtype,
        matters=rules.never,
        note="titan's auto is bfloat16 on a GPU; mixed precision has one path, FSDP's, also on one device"),
    _same("training.mixed_precision_reduce", "float32", "training.reduce_dtype"),
    _same("training.gc_freq", 50, "training.gc_interval"),
    _none("training.gc_debug", False, "titan.train has no such mode"),
    _same("training.dataloader.num_workers", 0, "data.num_workers"),
    _none("training.dataloader.persistent_workers", False, "workers live as long as the run"),
    _none("training.dataloader.pin_memory", False, "batches are copied ahead of their step without being asked"),
    Option("training.dataloader.prefetch_factor", None, ("data.prefetch",), rule=rules.prefetch, kinds=_NULL_OR_INT),
    _same("parallelism.data_parallel_replicate_degree", 1, "parallelism.dp_replicate"),
    _same("parallelism.data_parallel_shard_degree", -1, "parallelism.dp_shard"),
    _same("parallelism.fsdp_reshard_after_forward", "default", "parallelism.reshard_after_forward"),
    _same("parallelism.tensor_parallel_degree", 1, "parallelism.tp"),
    Option("parallelism.disable_loss_parallel", False, ("parallelism.loss_parallel",), rule=rules.loss_parallel),
    _same("parallelism.enable_async_tensor_parallel", False, "parallelism.async_tp"),
    _same("parallelism.pipeline_parallel_degree", 1, "parallelism.pp"),
    _same("parallelism.module_fqns_per_model_part", None, "parallelism.pp_modules", kinds=(list, type(None))),
    _same("parallelism.pipeline_parallel_first_stage_less_layers", 1, "parallelism.pp_less_first"),
    _same("parallelism.pipeline_parallel_last_stage_less_layers", 1, "parallelism.pp_less_last"),
    Option("parallelism.pipeline_parallel_layers_per_stage", None, ("parallelism.pp_stages_per_rank",),
        rule=rules.layers_per_stage, kinds=_NULL_OR_INT, matters=rules.if_set,
        note="titan counts stages of a rank, and shares the layers out over them"),
    Option("parallelism.pipeline_parallel_schedule", "1F1B", ("parallelism.pp_schedule",), rule=rules.schedule),
    Option("parallelism.pipeline_parallel_schedule_csv", "", ("parallelism.pp_schedule_csv",), rule=rules.csv,
        kinds=_NULL_OR_TEXT),
    Option("parallelism.pipeline_parallel_microbatch_size", 1, ("parallelism.pp_microbatches",), rule=rules.microbatch,
        matters=rules.has_larger_pieces,
        note="titan says into how many pieces a micro-batch is cut, TorchTitan how large a piece is"),
    _none("parallelism.pipeline_parallel_expert_parallel_overlap", True, _MOE),
    _same("parallelism.context_parallel_degree", 1, "parallelism.cp"),
    Option("parallelism.context_parallel_load_balancer", "headtail", ("parallelism.cp_head_tail",),
        rule=rules.load_balancer,
        kinds=_NULL_OR_TEXT),
    Option("parallelism.context_parallel_rotate_method", "allgather", ("parallelism.cp_method",),
        rule=rules.named("parallelism.cp_method", {"allgather": "allgather", "alltoall": "ring"}), matters=rules.has_cp,
        note="TorchTitan's alltoall passes keys and values on from rank to rank, titan's ring; titan's all_to_all "
        "exchanges sequence for heads, which TorchTitan has not"),
    _none("parallelism.expert_parallel_degree", 1, _MOE),
    _none("parallelism.expert_tensor_parallel_degree", 1, _MOE),
    _none("parallelism.expert_parallel_comm_backend", "standard", _MOE),
    Option("checkpoint.enable", False, ("checkpoint",), rule=rules.checkpoint, matters=rules.never,
        note="titan saves unless told not to, with checkpoint=disabled"),
    _none("checkpoint.enable_ft_dataloader_checkpoints", True, _FT),
    _none("checkpoint.folder", "checkpoint", f"{_FIXED}: checkpoints/", needs="checkpoint.enable"),
    _same("checkpoint.interval", 500, "checkpoint.interval", needs="checkpoint.enable"),
    Option("checkpoint.initial_load_path", None, ("checkpoint.initial_load",), rule=rules.initial_load,
        kinds=_NULL_OR_TEXT,
        needs="checkpoint.enable", matters=rules.if_set,
        note="a Hugging Face folder is recognised; a checkpoint of TorchTitan is not read"),
    Option("checkpoint.initial_load_model_only", True, ("checkpoint.initial_content",), rule=rules.initial_content,
        needs="checkpoint.enable"),
    _none("checkpoint.initial_load_in_hf", False, "titan sees what a folder holds", needs=""),
    _none("checkpoint.initial_load_in_hf_quantized", False, "weights are read in float32, bfloat16 or float16",
        needs="checkpoint.enable"),
    Option("checkpoint.last_save_model_only", True, ("checkpoint.last_content",), rule=rules.last_content,
        needs="checkpoint.enable", matters=rules.if_set,
        note="a run that ends with weights alone cannot be trained on; titan's own default keeps all"),
    _none("checkpoint.last_save_in_hf", False, "python -m titan.convert export RUN DIR --to hugging_face, afterwards",
        needs="checkpoint.enable"),
    Option("checkpoint.export_dtype", "float32", ("checkpoint.last_dtype",), rule=rules.export_dtype,
        needs="checkpoint.enable"),
    Option("checkpoint.async_mode", "disabled", ("checkpoint",), rule=rules.checkpoint, needs="checkpoint.enable"),
    _same("checkpoint.keep_latest_k", 10, "checkpoint.keep_latest", needs="checkpoint.enable"),
    _same("checkpoint.load_step", -1, "checkpoint.load_step", needs="checkpoint.enable",
        note="later checkpoints are set aside", matters=lambda value, given: value != -1),
    Option("checkpoint.exclude_from_loading", [], ("checkpoint.exclude",), rule=rules.exclude,
        needs="checkpoint.enable",
        matters=rules.if_set, note="of what a new run starts from; a run that goes on takes everything"),
    _same("checkpoint.enable_first_step_checkpoint", False, "checkpoint.save_initial", needs="checkpoint.enable",
        note="titan saves step 0, before training, not step 1", matters=rules.if_set),
    _none("checkpoint.create_seed_checkpoint", False,
        "the same seed gives the same weights on every layout; checkpoint.save_initial=true saves them",
        needs="checkpoint.enable"),
    _none("checkpoint.load_only", False, "python -m titan.convert inspect and verify read a checkpoint without a run",
        needs="checkpoint.enable"),
    Option("activation_checkpoint.mode", "selective",
        ("activation_checkpoint", "activation_checkpoint.every", "activation_checkpoint.memory_budget"),
        rule=rules.recompute, matters=lambda value, given: "activation_checkpoint.mode" not in given.named,
        note="a file that says nothing recomputes every second block in TorchTitan, titan nothing: it is spelled out"),
    Option("activation_checkpoint.selective_ac_option", "2", ("activation_checkpoint", "activation_checkpoint.every"),
        rule=rules.elsewhere,
        matters=lambda value, given: given["activation_checkpoint.mode"] == "selective" and str(value) != "op",
        note="a number counts blocks from 1 in TorchTitan and from 0 in titan: as many blocks, but others; op is "
        "activation_checkpoint=selective"),
    _none("activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns", ["moe.router.gate"], _MOE),
    _none("activation_checkpoint.early_stop", False, _AC_DEBUG),
    Option("activation_checkpoint.memory_budget", 0.5, ("activation_checkpoint.memory_budget",), rule=rules.elsewhere),
    _none("activation_checkpoint.visualize_memory_budget_pareto", False, "titan draws no such picture"),
    _none("activation_checkpoint.preserve_rng_state", True, _AC_DEBUG),
    _none("activation_checkpoint.determinism_check", "default", _AC_DEBUG),
    _none("activation_checkpoint.debug", False, _AC_DEBUG),
    Option("compile.enable", False, ("compile", "compile.loss", "compile.backend"), rule=rules.compile_),
    Option("compile.components", ["model", "loss"], ("compile", "compile.loss"), rule=rules.elsewhere),
    Option("compile.backend", "inductor", ("compile.backend",), rule=rules.elsewhere),
    Option("quantize.linear.float8.enable_fsdp_float8_all_gather", False, ("float8.fsdp_all_gather",),
        rule=rules.float8_gather, matters=rules.never,
        note="titan's default gathers in float8 wherever float8=tensorwise has shards to gather"),
    Option("quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp", False, ("float8.precompute_scales",),
        rule=rules.float8_scales, matters=rules.never,
        note="titan's default computes them in one exchange wherever weights are gathered so"),
    Option("quantize.linear.float8.recipe_name", None, ("float8",), rule=rules.elsewhere, kinds=_NULL_OR_TEXT,
        matters=rules.never, note="none named is tensorwise"),
    Option("quantize.linear.float8.filter_fqns", [],
        ("float8.filter_fqns", "float8.auto_filter_small_kn", "float8.convert_output"), rule=rules.float8_filter,
        matters=lambda value, given: rules.has_float8(given) and "output" not in value,
        note="titan leaves the output projection as it is unless float8.convert_output=true"),
    Option("quantize.linear.float8.emulate", False, ("float8.emulate",), rule=rules.float8_emulate),
    _none("quantize.linear.mx.mxfp8_dim1_cast_kernel_choice", "triton", "titan has no MXFP8"),
    _none("quantize.linear.mx.recipe_name", "mxfp8_cublas", "titan has no MXFP8"),
    _none("quantize.linear.mx.filter_fqns", ["output"], "titan has no MXFP8"),
    _none("quantize.grouped_mm.float8.fqns", [], _MOE, kinds=(list, str)),
    _none("quantize.grouped_mm.mx.recipe_name", "mxfp8", _MOE),
    _none("quantize.grouped_mm.mx.fqns", [], _MOE, kinds=(list, str)),
    Option("comm.init_timeout_seconds", 300, ("cluster.timeout_seconds",), rule=rules.first_timeout,
        note="of one collective at any time; building and the first step have a watchdog, "
        "fault_tolerance.first_step_timeout_seconds"),
    Option("comm.train_timeout_seconds", 100, ("fault_tolerance.step_timeout_seconds",), rule=rules.step_timeout,
        note="of a whole step, not of one collective; the rank that hangs is named"),
    _none("comm.trace_buf_size", 20000, "the watchdog names the rank that hangs, with its stack"),
    _none("comm.save_traces_folder", "comm_traces", "the watchdog names the rank that hangs, with its stack"),
    _none("comm.save_traces_file_prefix", "rank_", "the watchdog names the rank that hangs, with its stack"),
    Option("comm.mode", "default", ("cluster",), rule=rules.comm_mode, matters=lambda value, given: value != "default",
        note="cluster=simulated builds one rank of the cluster on the real mesh, and says what memory it takes"),
    _none("memory_estimation.enable", False, "cluster=simulated says what a rank takes"),
    _none("memory_estimation.disable_fake_mode", False, "cluster=simulated says what a rank takes"),
    _none("fault_tolerance.enable", False, _FT),
    _none("fault_tolerance.process_group", "gloo", _FT),
    _none("fault_tolerance.process_group_timeout_ms", 10000, _FT),
    _none("fault_tolerance.replica_id", 0, _FT),
    _none("fault_tolerance.group_size", 0, _FT),
    _none("fault_tolerance.min_replica_size", 1, _FT),
    _none("fault_tolerance.semi_sync_method", None, _FT, kinds=_NULL_OR_TEXT),
    _none("experimental.custom_import", "", "a model of your own is named by model.family=package.module:NAME"),
    _none("experimental.custom_args_module", "", "groups of your own are YAML files: --config-dir"),
    Option("validation.enable", False,
        ("validation", "validation.interval", "validation.rows", "validation.data.path", "validation.data.dataset",
        "validation.data.subset"),
        rule=rules.validation, matters=rules.if_set,
        note="one loss over all valid tokens of the rows, also after the last step, not after the first"),
    Option("validation.dataset", "c4_validation", ("validation",), rule=rules.elsewhere, needs="validation.enable"),
    Option("validation.dataset_path", None, ("validation.data.path", "validation.data.dataset"),
        rule=rules.elsewhere, kinds=_NULL_OR_TEXT, needs="validation.enable"),
    Option("validation.local_batch_size", 8, ("validation.rows",), rule=rules.elsewhere, needs="validation.enable",
        note="it counts into validation.rows; micro-batches are training.local_batch_size rows"),
    Option("validation.seq_len", 2048, ("training.seq_len",), rule=rules.validation_seq_len, needs="validation.enable"),
    Option("validation.freq", 10, ("validation.interval",), rule=rules.elsewhere, needs="validation.enable"),
    Option("validation.steps", -1, ("validation.rows",), rule=rules.elsewhere, needs="validation.enable",
        note="titan counts rows over all ranks: steps x validation.local_batch_size x data-parallel ranks"),
    _none("validation.dataloader.num_workers", 0, "data.num_workers is for both", needs="validation.enable"),
    _none("validation.dataloader.persistent_workers", False, "workers live as long as the run",
        needs="validation.enable"),
    _none("validation.dataloader.pin_memory", False, "batches are copied ahead without being asked",
        needs="validation.enable"),
    _none("validation.dataloader.prefetch_factor", None, "data.prefetch is for both", kinds=_NULL_OR_INT,
        needs="validation.enable"),
    Option("debug.seed", None, ("training.seed",), rule=rules.seed, kinds=_NULL_OR_INT, matters=rules.always,
        note="without one TorchTitan draws it anew each time, titan takes 0; the same number gives other weights "
        "than in TorchTitan, but the same on every layout"),
    _same("debug.deterministic", False, "training.deterministic"),
    _none("debug.deterministic_warn_only", False, "an operation without a deterministic kernel is an error"),
    _none("debug.moe_force_load_balance", False, _MOE),
)
# fmt: on
"""All options, in TorchTitan's order."""

RENAMED = {
    "checkpoint.enable_checkpoint": "checkpoint.enable",
    "checkpoint.model_weights_only": "checkpoint.last_save_model_only",
    "float8.enable_fsdp_float8_all_gather": "quantize.linear.float8.enable_fsdp_float8_all_gather",
    "float8.precompute_float8_dynamic_scale_for_fsdp": (
        "quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp"
    ),
    "float8.recipe_name": "quantize.linear.float8.recipe_name",
    "float8.filter_fqns": "quantize.linear.float8.filter_fqns",
    "float8.emulate": "quantize.linear.float8.emulate",
    "job.print_args": "job.print_config",
    "lr_scheduler.lr_min": "lr_scheduler.min_lr_factor",
    "training.batch_size": "training.local_batch_size",
    "training.compile": "compile.enable",
    "training.seed": "debug.seed",
    "training.deterministic": "debug.deterministic",
    "validation.enabled": "validation.enable",
}
"""What earlier versions of TorchTitan called an option."""

IGNORED = ("job.use_for_integration_test",)
"""What earlier versions had for their own tests."""


def find_option(name: str) -> Option | None:
    """Return an option by its name."""
    return _BY_NAME.get(name)


_BY_NAME = {option.name: option for option in OPTIONS}
