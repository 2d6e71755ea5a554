"""Every option of titan, as typed dataclasses with a docstring under each field.

Config is inert: nothing here builds anything, and nothing below the entry points sees the whole tree. The names
are the ones on the command line, in the YAML files, on the mesh axes and in the log. Enums are spelled by name,
because that is what a user types. A test holds that every field has a docstring and that something reads it.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING


class Node:
    """What every node of the config is: in it a misspelt key cannot be set, for nothing would read it."""

    def __setattr__(self, name: str, value: Any) -> None:
        known = list(getattr(type(self), "__dataclass_fields__", ()))
        # what others derive from a node may have attributes of its own
        if type(self).__module__ == __name__ and name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
            raise AttributeError(
                f"{type(self).__name__} has no key {name}. "
                + (f"Nearest: {', '.join(near)}" if near else f"Its keys: {', '.join(known)}")
            )
        super().__setattr__(name, value)


class Device(Enum):
    """Where the ranks compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Dtype(Enum):
    """Floating-point formats for compute and for reductions; `auto` depends on the device."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class CompileMode(Enum):
    """What torch.compile spends its time on; the values are PyTorch's names."""

    default = "default"
    reduce_overhead = "reduce-overhead"
    max_autotune = "max-autotune"
    max_autotune_no_cudagraphs = "max-autotune-no-cudagraphs"

    @property
    def has_cuda_graphs(self) -> bool:
        """Whether PyTorch records CUDA graphs in this mode, on CUDA."""
        return self in (CompileMode.reduce_overhead, CompileMode.max_autotune)


class ClusterKind(Enum):
    """What starts the ranks."""

    local = "local"
    slurm = "slurm"
    simulated = "simulated"


class DataKind(Enum):
    """Where documents come from."""

    python_stdlib = "python_stdlib"
    jsonl = "jsonl"
    text = "text"
    parquet = "parquet"
    arrow = "arrow"
    huggingface = "huggingface"
    mixture = "mixture"
    prepared = "prepared"


class RecordFormat(Enum):
    """What a record holds: a text, or a conversation of which only the assistant's part is learned."""

    text = "text"
    chat = "chat"


class Packing(Enum):
    """How documents become rows of equal length."""

    concat = "concat"
    best_fit = "best_fit"


class BadDocuments(Enum):
    """What to do with a document that cannot be read."""

    error = "error"
    skip = "skip"


class TokenizerKind(Enum):
    """How text becomes tokens."""

    bytes = "bytes"
    tiktoken = "tiktoken"
    llama3 = "llama3"
    sentencepiece = "sentencepiece"
    huggingface = "huggingface"


class DecayType(Enum):
    """The shape of the learning rate's last part."""

    linear = "linear"
    cosine = "cosine"
    sqrt = "sqrt"


class ReshardAfterForward(Enum):
    """Whether FSDP frees a block's gathered weights between forward and backward."""

    default = "default"
    always = "always"
    never = "never"


class Attention(Enum):
    """What computes attention: PyTorch, or titan itself on a CPU; `default` depends on device and data."""

    default = "default"
    flash = "flash"
    cudnn = "cudnn"
    efficient = "efficient"
    math = "math"
    flash3 = "flash3"
    flex = "flex"
    cpu = "cpu"


class ContextMethod(Enum):
    """How ranks that share a sequence attend to each other's part of it."""

    allgather = "allgather"
    ring = "ring"
    all_to_all = "all_to_all"


PipelineSchedule = Enum(
    "PipelineSchedule",
    ["GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"],
)
"""In which order a pipeline works; the names are PyTorch's."""


CheckpointMode = Enum("CheckpointMode", ["disabled", "sync", "async", "async_pinned"])
"""How checkpoints are written."""


class CheckpointContent(Enum):
    """What a checkpoint holds, or what is taken from it."""

    all = "all"
    weights = "weights"


class OnSpike(Enum):
    """What to do at a loss or a gradient that is not finite."""

    stop = "stop"
    skip = "skip"
    rollback = "rollback"


class ActivationCheckpointMode(Enum):
    """Which activations are recomputed in the backward pass instead of kept."""

    none = "none"
    full = "full"
    selective = "selective"
    every_nth = "every_nth"
    memory_budget = "memory_budget"


class WandbMode(Enum):
    """Where rows for Weights & Biases go first; the values are its own names."""

    online = "online"
    offline = "offline"


class Float8Recipe(Enum):
    """How float8 scales are chosen; the names are torchao's."""

    none = "none"
    tensorwise = "tensorwise"
    rowwise = "rowwise"
    rowwise_with_gw_hp = "rowwise_with_gw_hp"


@dataclass
class RunConfig(Node):
    """Where a run keeps its files."""

    name: str = MISSING
    """What the run is called; the default run directory carries it."""
    dir: str = MISSING
    """The folder of everything the run writes. The same folder again resumes the run."""


@dataclass
class RopeScalingConfig(Node):
    """Llama 3.1's stretching of the rotary frequencies beyond the length it was first trained at."""

    factor: float = MISSING
    """How many times longer the context becomes."""
    low_freq_factor: float = 1.0
    """Wavelengths above original_seq_len / low_freq_factor are stretched by the whole factor."""
    high_freq_factor: float = 4.0
    """Wavelengths below original_seq_len / high_freq_factor are left alone; in between they blend."""
    original_seq_len: int = 8192
    """Tokens of context before the stretching."""


@dataclass
class ModelConfig(Node):
    """The shape of a Llama."""

    name: str = MISSING
    """The flavor, for people: it names the run."""
    dim: int = MISSING
    """Width of the residual stream."""
    n_layers: int = MISSING
    """Number of transformer blocks."""
    n_heads: int = MISSING
    """Query heads of a block."""
    n_kv_heads: int = MISSING
    """Key and value heads of a block; fewer than n_heads is grouped-query attention."""
    ffn_dim: int = MISSING
    """Inner width of the feed-forward layer."""
    vocab_size: int = MISSING
    """Rows of the embedding; the tokenizer may use fewer."""
    max_seq_len: int = MISSING
    """Tokens of context that the published model supports."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    rope_theta: float = 500000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScalingConfig | None = None
    """Stretching of the rotary frequencies, or null."""
    family: str = "llama"
    """llama, or a `titan.models.family.ModelFamily` of your own as package.module:NAME."""
    tie_embeddings: bool = False
    """Whether the output projection shares the embedding's weights."""


@dataclass
class TrainingConfig(Node):
    """The loop: how long, how much at once, how precisely."""

    steps: int = MISSING
    """Optimizer steps of the whole run."""
    seq_len: int = MISSING
    """Tokens of one row."""
    local_batch_size: int = MISSING
    """Rows of one micro-batch on one data rank."""
    global_batch_size: int = -1
    """Rows of one step over all data ranks; -1 is one micro-batch a data rank. More accumulates gradients."""
    seed: int = 0
    """Fixes the initial weights and the order of the data."""
    deterministic: bool = False
    """Use only operations that give the same bits every time; slower on a GPU."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 leaves them alone."""
    param_dtype: Dtype = Dtype.auto
    """Format of weights and activations in forward and backward; auto is bfloat16 where the device has units for it."""
    reduce_dtype: Dtype = Dtype.float32
    """Format in which gradients are summed over ranks; auto is float32."""
    attention: Attention = Attention.default
    """A kernel of PyTorch's SDPA (flash, cudnn, efficient, math), FlashAttention 3, flex for documents kept apart, or
    titan's own for a CPU; default takes the fastest that can do what is asked."""
    loss_chunk_size: int = -1
    """Positions whose logits are there at a time; -1 chooses by the number of words, 0 computes all logits at once."""
    gc_interval: int = 50
    """Steps between garbage collections, which all ranks then do together."""


@dataclass
class ParallelismConfig(Node):
    """Degrees of the mesh's axes, outermost first. Their product is the world size."""

    pp: int = 1
    """Pipeline stages."""
    dp_replicate: int = 1
    """Replicas of the (sharded) model; -1 takes what is left."""
    dp_shard: int = -1
    """Ranks that share one copy of the weights, gradients and optimizer states; -1 takes what is left."""
    cp: int = 1
    """Ranks that share one sequence."""
    tp: int = 1
    """Ranks that share one weight matrix."""
    reshard_after_forward: ReshardAfterForward = ReshardAfterForward.default
    """Whether FSDP frees gathered weights after the forward pass; default is always, but never with a pipeline or where
    one rank has them all."""
    cpu_offload: bool = False
    """Keep this rank's shards, their gradients and the optimizer in the CPU's memory; the step is taken there too."""
    sequence_parallel: bool = True
    """With tp: cut what lies between the matrices along the sequence too; saves memory at the same traffic."""
    loss_parallel: bool = True
    """With tp: compute the loss without gathering the logits."""
    async_tp: bool = False
    """With tp, compiled on CUDA: cut each exchange and the matrix product beside it into pieces that overlap."""
    cp_method: ContextMethod = ContextMethod.allgather
    """With cp: fetch all keys and values, pass them around a ring, or exchange sequence for heads."""
    cp_head_tail: bool = True
    """With cp: give each rank a chunk from the head and one from the tail, so that a causal mask costs all the same."""
    pp_schedule: PipelineSchedule = PipelineSchedule["1F1B"]
    """With pp: the order of forward and backward passes."""
    pp_schedule_csv: str | None = None
    """With pp: a file with a schedule of your own instead, one line a rank: `titan.config.schedule_file`."""
    pp_microbatches: int = -1
    """With pp: into how many pieces a micro-batch is cut on its way through the stages; -1 is one row each."""
    pp_stages_per_rank: int = 2
    """With pp and a looped schedule (Interleaved1F1B, LoopedBFS, InterleavedZeroBubble): stages of each rank."""
    pp_less_first: int = 1
    """With pp: blocks that the embedding counts for when blocks are shared out."""
    pp_less_last: int = 1
    """With pp: blocks that the last norm and the output projection count for when blocks are shared out."""
    pp_modules: list[list[str]] | None = None
    """With pp: the modules of every stage, in order, such as [[tok_embeddings,layers.0],[layers.1,norm,output]]."""


@dataclass
class ClusterConfig(Node):
    """The machines that the ranks run on."""

    kind: ClusterKind = MISSING
    """What starts the ranks."""
    nodes: int | None = None
    """Machines; null is 1, or as many as an outer launcher such as torchrun has started."""
    devices_per_node: int | None = None
    """Ranks of one machine; null is all its GPUs, or 1 process on a CPU."""
    device: Device = Device.auto
    """cpu, cuda, or auto: cuda where there is one."""
    timeout_seconds: int = 600
    """Longest wait for another rank in one collective, in seconds."""
    grace_seconds: int = 120
    """Seconds that ranks have for the step in hand and its checkpoint, between being told to stop and their end."""
    partition: str | None = None
    """With cluster=slurm: the partition; null is the site's default."""
    account: str | None = None
    """With cluster=slurm: the account that pays."""
    qos: str | None = None
    """With cluster=slurm: the quality of service."""
    reservation: str | None = None
    """With cluster=slurm: a reservation to run in."""
    constraint: str | None = None
    """With cluster=slurm: features that nodes must have."""
    time: str | None = None
    """With cluster=slurm: the limit of one start as hours:minutes:seconds or days-hours; null is the partition's."""
    exclusive: bool = False
    """With cluster=slurm: let no other job onto the nodes."""
    cpus_per_task: int | None = None
    """With cluster=slurm: CPU cores of each rank."""
    memory: str | None = None
    """With cluster=slurm: memory of each node such as 500G; 0 is all of it, null the site's default."""
    setup: list[str] = field(default_factory=list)
    """With cluster=slurm: shell commands of the batch script before the ranks start; the script ends if one fails."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables for the ranks, such as NCCL_DEBUG. Not for secrets: what the shell exports is passed through anyway."""
    python: str | None = None
    """With cluster=slurm: the Python of the nodes, in a container for instance; null is this one."""
    container_image: str | None = None
    """With cluster=slurm: an image for the ranks to run in, through the pyxis plugin."""
    container_mounts: list[str] = field(default_factory=list)
    """With a container: folders to mount as /outside:/inside; the run's own folder and the cache are there anyway."""
    sbatch: dict[str, str] = field(default_factory=dict)
    """With cluster=slurm: more arguments of sbatch, such as {mail-type: END}; an empty text for a bare flag."""
    srun: dict[str, str] = field(default_factory=dict)
    """With cluster=slurm: more arguments of srun, which starts the ranks."""
    max_requeues: int = 50
    """With cluster=slurm: how often a job that was stopped in order is put back into the queue to go on."""
    array_parallelism: int = 256
    """With cluster=slurm and a sweep: how many points of one array run at once."""
    wait: bool = False
    """With cluster=slurm: stay, show the log of rank 0, and end with the job's exit code."""
    print_script: bool = False
    """With cluster=slurm: show the batch script, and submit nothing."""
    inside_job: bool = False
    """With cluster=slurm: submit even where this shell is inside a job itself."""
    simulated_rank: int = 0
    """With cluster=simulated: the rank to build."""
    simulated_steps: int = 0
    """With cluster=simulated: steps to execute here, on invented data and without the others; 0 only builds."""


@dataclass
class SourceConfig(Node):
    """Documents: where they are and how a record of them is read."""

    kind: DataKind = MISSING
    """Where documents come from."""
    path: str | None = None
    """A file, a folder or a glob (** crosses folders); .gz and .zst are read as they are."""
    dataset: str | None = None
    """With data=huggingface: the dataset's name on the hub, or a folder that was saved from there."""
    subset: str | None = None
    """With data=huggingface: the dataset's configuration, such as en; null is its default."""
    revision: str | None = None
    """With data=huggingface: a commit, branch or tag of the dataset."""
    split: str = "train"
    """With data=huggingface: the split to read."""
    format: RecordFormat = RecordFormat.text
    """text learns all of a document; chat reads a conversation and learns only what the assistant says."""
    text_field: str = "text"
    """The key of a record that holds the document."""
    messages_field: str = "messages"
    """With data.format=chat: the key of a record that holds the list of messages, each with a role and content."""
    bad_documents: BadDocuments = BadDocuments.error
    """What to do with one that cannot be read: stop with file and line, or skip, count and report it."""


@dataclass
class ComponentConfig(SourceConfig):
    """A part of a mixture."""

    weight: float = 1.0
    """Its share of the rows, beside the other components' weights."""


@dataclass
class DataConfig(SourceConfig):
    """The text to train on."""

    components: dict[str, ComponentConfig] = field(default_factory=dict)
    """With data=mixture: what it is mixed of, by name."""
    streaming: bool = False
    """Tokenise while training, instead of once before it."""
    streams: int = 64
    """With data.streaming: into how many streams the documents are shared out, at most; ranks share out the streams."""
    shuffle_window: int = 1000
    """With data.streaming: documents of a stream that are shuffled together; 1 leaves them in order."""
    packing: Packing = Packing.concat
    """concat cuts documents where a row ends; best_fit cuts only those longer than a row, and pads."""
    mask_documents: bool = False
    """Keep attention inside documents and count positions from their beginnings; false lets it see all of the row."""
    num_workers: int = 0
    """Processes a rank uses to read ahead; 0 reads in the rank itself."""
    prefetch: int = 2
    """With data.num_workers: micro-batches that each worker reads ahead."""
    prepare_workers: int | None = None
    """Processes that tokenise before training; null is one for each core."""
    cache_dir: str | None = None
    """Where tokenised text is kept for the next run; null is titan's folder in the user's cache."""


@dataclass
class ValidationConfig(Node):
    """The loss on text that is not trained on."""

    interval: int = 0
    """Steps between validations, which also happen after the last step; 0 is never."""
    rows: int = -1
    """Rows to look at, from the first on; -1 is all of them, once."""
    data: SourceConfig | None = None
    """The held-out text, or null; tokenised, packed and masked as the data to train on."""
    sample_prompts: list[str] = field(default_factory=list)
    """Texts that are continued after each validation, for people to read, into <run.dir>/samples.jsonl."""
    sample_tokens: int = 64
    """Tokens behind each of sample_prompts, at most; each takes a forward pass over the whole text before it."""
    sample_temperature: float = 0.0
    """With sample_prompts: 0 takes the likeliest token every time, 1 draws with the model's own probabilities."""
    sample_top_p: float = 1.0
    """With sample_temperature: draw from the fewest likeliest tokens that have this share of the probability."""


@dataclass
class TokenizerConfig(Node):
    """How text becomes tokens."""

    kind: TokenizerKind = MISSING
    """What reads it: llama3 and bytes need no file."""
    path: str | None = None
    """Its file, or with tokenizer=huggingface its folder; llama3 and bytes need none."""
    fingerprint: str | None = None
    """What tells it from every other tokenizer: filled in before a run starts, held against the file if given."""


@dataclass
class OptimizerConfig(Node):
    """AdamW."""

    lr: float = MISSING
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    decay_embeddings: bool = False
    """Whether weight decay also acts on the embedding."""
    decay_norms: bool = False
    """Whether weight decay also acts on norms and biases."""
    state_dtype: Dtype = Dtype.float32
    """Format that both moments are kept in; bfloat16 halves their memory, and steps are computed in float32 anyway.
    auto is float32."""


@dataclass
class LrSchedulerConfig(Node):
    """Warm up, stay, decay."""

    warmup_steps: int = MISSING
    """Steps from zero to the peak."""
    decay_ratio: float | None = None
    """Share of the steps spent decaying, at the end; null decays right after the warm-up."""
    decay_type: DecayType = DecayType.linear
    """The shape of the decay."""
    min_lr_factor: float = 0.0
    """The last learning rate as a share of the peak."""


@dataclass
class Float8Config(Node):
    """Float8 matrix products through torchao."""

    recipe: Float8Recipe = Float8Recipe.none
    """How scales are chosen; none leaves the model as it is."""
    filter_fqns: list[str] = field(default_factory=list)
    """Linears whose name contains one of these stay as they are."""
    auto_filter_small_kn: bool = False
    """Linears too small to gain from float8 stay as they are, by torchao's rule, measured on H100."""
    convert_output: bool = False
    """Exchange the projection to words too, whose rounding goes straight into the loss."""
    fsdp_all_gather: bool | None = None
    """Gather weights in float8 under FSDP; null does with float8=tensorwise, where there is something to gather."""
    precompute_scales: bool | None = None
    """Compute the scales of all gathered weights in one exchange after each step; null does with fsdp_all_gather."""
    emulate: bool = False
    """Compute with the rounding of float8 but without its hardware, for tests; slow."""


@dataclass
class CompileConfig(Node):
    """torch.compile, block by block."""

    enable: bool = False
    """Compile every transformer block."""
    loss: bool = True
    """Compile the loss too."""
    optimizer: bool = False
    """Compile the optimizer's update too, instead of taking PyTorch's fused kernel."""
    backend: str = "inductor"
    """The compiler's backend, by PyTorch's name."""
    mode: CompileMode = CompileMode.default
    """What the compiler spends its time on, by PyTorch's name; only inductor has any other than default."""
    dynamic: bool | None = None
    """Compile for any shape at once; false compiles each anew, null does that once and then takes any."""


@dataclass
class ActivationCheckpointConfig(Node):
    """Recompute activations in the backward pass instead of keeping them."""

    mode: ActivationCheckpointMode = ActivationCheckpointMode.none
    """none, full (every block), selective (by operator: the expensive results are kept), every_nth block, or
    memory_budget (the compiler chooses what to keep)."""
    every: int = 2
    """With every_nth: checkpoint each block whose index is a multiple of this."""
    memory_budget: float = 0.5
    """With memory_budget: what may be kept, as a share of what would be kept without recomputing; 0 is as full."""


@dataclass
class CheckpointConfig(Node):
    """Saving and resuming."""

    mode: CheckpointMode = MISSING
    """disabled; sync: training waits while it is written; async: only while it is copied to the CPU's memory;
    async_pinned: not even that, for the next step's forward and backward go on meanwhile, at the price of keeping
    that memory."""
    interval: int = 500
    """Steps between checkpoints; the last step is always saved."""
    interval_minutes: float = 0.0
    """Save also when so many minutes have passed since the last checkpoint; 0 goes by steps alone."""
    keep_latest: int = 3
    """How many to keep; 0 keeps all."""
    keep_every: int = 0
    """Keep for good each checkpoint whose step is a multiple of this; 0 keeps none."""
    save_initial: bool = False
    """Save step 0, the weights before training: a seed from which other layouts and other systems can start."""
    last_content: CheckpointContent = CheckpointContent.all
    """What the last step's checkpoint holds: all, or the weights alone, from which the run cannot go on."""
    last_dtype: Dtype = Dtype.auto
    """With last_content=weights: the format they are saved in; auto is that of training, float32."""
    max_failures: int = 10
    """Saves that may fail in a row, because the disk is full for instance, before the run ends with 73."""
    retry_seconds: float = 60.0
    """Time before a failed save is tried again; training goes on meanwhile."""
    verify: bool = True
    """Hold every byte of a checkpoint against its checksum before it is loaded; false looks at sizes only."""
    strict: bool = False
    """End the run with 66 at a damaged checkpoint, instead of setting it aside and taking the one before."""
    load_step: int = -1
    """The step to go back to; later checkpoints are set aside. -1 goes on from the newest."""
    initial_load: str | None = None
    """What a new run starts from: a checkpoint folder of another run, or a Hugging Face folder."""
    initial_content: CheckpointContent = CheckpointContent.weights
    """With initial_load: take the weights alone, or all, optimizer and position in the data included."""
    exclude: list[str] = field(default_factory=list)
    """With initial_load: tensors that are not taken, by patterns of their names, such as optimizer.* or
    model.output.weight. A run that goes on takes everything."""


@dataclass
class FaultToleranceConfig(Node):
    """What a run does when something goes wrong. A rank that hangs ends it with 74, and is named."""

    step_timeout_seconds: int = 300
    """Seconds that a step may take; 0 lets a hang be, until a collective times out."""
    first_step_timeout_seconds: int = 1800
    """Seconds from the ranks' meeting to the end of the first step, with building, loading and compiling; at least
    step_timeout_seconds, and 0 is no limit."""
    save_timeout_seconds: int = 1800
    """Seconds that writing or reading a checkpoint, or a validation, may take; at least step_timeout_seconds, and 0 is
    no limit."""
    on_spike: OnSpike = OnSpike.stop
    """At a loss or gradient that is not finite, before any weight has moved: stop the run with 71; skip the batch; or
    go back to the last checkpoint and skip all batches from there to this one."""
    spike_grad_norm: float | None = None
    """Take a gradient norm above this for a spike too."""
    max_spikes: int = 10
    """Spikes of one run after which it stops whatever on_spike says."""


@dataclass
class WandbConfig(Node):
    """Weights & Biases. Its key comes from WANDB_API_KEY or `wandb login`, never from here: this is written down."""

    enable: bool = False
    """Send the numbers, the whole config and the machine's own figures."""
    mode: WandbMode = WandbMode.online
    """online, or offline: into <run.dir>/wandb, for `wandb sync` to send later."""
    project: str = "titan"
    """The project that the run is listed in."""
    entity: str | None = None
    """The user or team; null is the key's default."""
    name: str | None = None
    """What the run is called there; null is the path of its directory."""
    group: str | None = None
    """Runs of one group are shown together; null groups the points of a sweep."""
    tags: list[str] = field(default_factory=list)
    """Words to find the run by."""


@dataclass
class MetricsConfig(Node):
    """What is written down while training."""

    log_every: int = MISSING
    """Steps between two lines on the console and in metrics.jsonl."""
    tensorboard: bool = False
    """Write the same numbers for TensorBoard, to <run.dir>/tensorboard."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Send the same numbers to Weights & Biases."""


@dataclass
class ProfilingConfig(Node):
    """A close look at some steps: where their time goes, and the GPU's memory."""

    enable: bool = False
    """Write one trace a rank to <run.dir>/profiles; say what the time went into, and the costliest operators."""
    memory_snapshot: bool = False
    """On CUDA: write which lines of code hold the memory, after the last of these steps or when it runs out before."""
    start_step: int = 10
    """First step to look at; the one before is traced and thrown away as warm-up."""
    steps: int = 3
    """How many steps to look at."""


@dataclass
class TitanConfig(Node):
    """The whole config: one node for each group in conf/, and `run` and `training`."""

    run: RunConfig = field(default_factory=RunConfig)
    """Where the run keeps its files."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The shape of the Llama."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The loop."""
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    """Degrees of the mesh's axes."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """The machines."""
    data: DataConfig = field(default_factory=DataConfig)
    """The text."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """How text becomes tokens."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """The loss on held-out text."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW."""
    lr_scheduler: LrSchedulerConfig = field(default_factory=LrSchedulerConfig)
    """The learning rate over time."""
    float8: Float8Config = field(default_factory=Float8Config)
    """Float8 matrix products."""
    compile: CompileConfig = field(default_factory=CompileConfig)
    """torch.compile."""
    activation_checkpoint: ActivationCheckpointConfig = field(default_factory=ActivationCheckpointConfig)
    """Recomputing activations."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving and resuming."""
    fault_tolerance: FaultToleranceConfig = field(default_factory=FaultToleranceConfig)
    """When something goes wrong."""
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    """What is written down."""
    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)
    """A close look at some steps."""
