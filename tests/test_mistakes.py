"""A user's mistake ends with exit code 2, no traceback and the words to type instead, and changes nothing."""

from __future__ import annotations

import base64
import json
import shlex
import shutil
from pathlib import Path

import pytest

from .conftest import Command
from .support.command import TINY, files_below

WEIGHTS = {
    **{"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8},
    **{"num_key_value_heads": 4, "intermediate_size": 96, "vocab_size": 300},
}
"""What config.json says of weights."""

PATHS = ("documents", "folder_without_files", "folder_of_empty_files", "mine")


@pytest.fixture
def here(here: Path) -> Path:
    """A folder with files that a command line can point at, good ones and bad ones."""
    (here / "folder_without_files").mkdir()
    for name in ("documents/hello.txt", "folder_of_empty_files/a.txt", "folder_of_empty_files/b.txt"):
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_text("hello\n" if name.startswith("documents") else "")
    (here / "compressed").mkdir()
    (here / "compressed" / "a.jsonl.bz2").write_bytes(b"BZh9")
    (here / "records.jsonl").write_text('{"id": "a", "content": "a longer text"}\n')
    (here / "records.parquet").write_bytes(b"PAR1")
    (here / "weights").mkdir()
    (here / "weights" / "model.safetensors").write_bytes(b"")
    (here / "weights" / "config.json").write_text(json.dumps(WEIGHTS))
    (here / "step_00000004").mkdir()
    (here / "step_00000004" / ".metadata").write_bytes(b"")
    (here / "step_00000004" / "config.yaml").write_text("model: {n_heads: 16, n_layers: 6, tie_embeddings: false}\n")
    (here / "garbled.model").write_text("these are words and no ranks\n")
    (here / "empty.model").write_text("")
    ranks = [f"{base64.b64encode(bytes([value])).decode()} {value}\n" for value in range(256)]
    (here / "tokenizer.model").write_text("".join(ranks))
    (here / "tokenizer.json").write_text('{"model": {"vocab": {"<s>": 0, "</s>": 5000}}}')
    (here / "a_file").write_text("")
    (here / "two.csv").write_text("0F0,,,0B0\n,1F0,1B0,\n")
    (here / "words.csv").write_text("0F0,0B0\n1F0,what\n")
    (here / "forward.csv").write_text("0F0,0B0\n1F0\n")
    for name, text in {
        "model/broken.yaml": "name: [1,\n  dim: 3\n",
        "model/misspelt.yaml": "defaults: [llama3_debug, _self_]\ndimm: 3\n",
        "model/no_number.yaml": "defaults: [llama3_debug, _self_]\ndim: big\n",
        "model/orphan.yaml": "defaults: [llama3_debugg, _self_]\n",
        "model/half.yaml": "name: half\ndim: 64\n",
        "model/nameless.yaml": "n_layers: 3\n",
        "experiment/nested.yaml": "training:\n  steps: 4\n",
        "experiment/nested_choice.yaml": "defaults:\n  - override /model: llama3_8b\n",
        "experiment/misspelt.yaml": "# @package _global_\ntraining:\n  stepps: 4\n",
        "experiment/no_model.yaml": "# @package _global_\ndefaults:\n  - override /model: llama3_debugg\n",
    }.items():
        (here / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "mine" / name).write_text(text)
    return here


MISTAKES = {
    # groups and options
    "an unknown option": ("model=llama3_8bb", "model=llama3_8bb is not an option", "Try  model=llama3_8b"),
    "an unknown option of another group": ("parallelism=fsdpp", "There are: ddp, fsdp", "Try  parallelism=fsdp"),
    "an option like no other": ("model=gpt", "model=gpt is not an option", "llama3_debug", "one of these"),
    "an option of a folder that is not there": ("model=llama3/8b", "model=llama3/8b is not an option", "llama3_8b"),
    "no option": ("model=null", "model=null is not an option", "There are: llama2_13b"),
    "none where none is an option": ("profiling=null", "Try  profiling=none"),
    "a number for an option": ("training=5", "training=5 is not an option", "There are: default"),
    "a cluster that this version lacks": ("cluster=kubernetes", "not an option of the group cluster", "local"),
    "an unknown group": ("modle=llama3_8b", "modle is not a config group", "Groups: ", "Try  model=llama3_8b"),
    "an unknown group and option": ("modle=llama3_8bb", "modle is not a config group", "Try  model=llama3_8b"),
    "an unknown group and an option like no other": (
        "modle=x",
        "Of the group model there are: llama2_13b",
        "Try  model=...   with one of these",
    ),
    "another optimizer": ("optimizer=sgd", "There are: adamw", "examples/own_loop.py"),
    "a group that is a path": ("training/default=3", "training/default is not a config group", "Try  training=default"),
    "a group added twice": ("+model=llama3_8b", "+model=llama3_8b adds what is there", "Try  model=llama3_8b"),
    "a group taken away": ("~model", "~model leaves the group model out", "There are: llama2_13b"),
    "a group in a package": ("model@other=llama3_debug", "model@other=llama3_debug", "Try  model=llama3_debug"),
    "an unknown launcher": ("hydra/launcher=nope", "hydra/launcher=nope is not an option", "basic"),
    # keys
    "an unknown key": ("training.stepps=5", "training.stepps is not a key", "Try  training.steps=5"),
    "an unknown key with +": ("+training.stepps=5", "training.stepps is not a key", "Try  training.steps=5"),
    "an unknown key with ++": ("++training.stepps=5", "training.stepps is not a key", "Try  training.steps=5"),
    "a key without its group": ("seq_len=64", "seq_len is not a key", "Try  training.seq_len=64"),
    "a key of another group": ("optimizer.steps=5", "optimizer.steps is not a key", "training.steps"),
    "a key like no other": ("+colour=blue", "colour is not a key", "--help"),
    "an unknown nested key": (
        "model=llama3_8b model.rope_scaling.facter=8",
        "model.rope_scaling.facter is not a key",
        "Try  model.rope_scaling.factor=8",
    ),
    "an unknown key in braces": ("training={stepps:5}", "not an option of the group training", "training=..."),
    "an unknown key of run in braces": ("run={dirr:5}", "run.dirr is not a key", "Try  run.dir=..."),
    "a key below one that is null": (
        "model.rope_scaling.factor=8",
        "model.rope_scaling.factor=8 sets a key below model.rope_scaling, which is null",
        "--config-dir DIR",
    ),
    "a key that is there, with +": ("+training.steps=5", "adds what is there already", "Try  training.steps=5"),
    "a key taken away": ("~training.steps", "~training.steps takes a key away", "Try  training.steps=..."),
    "an optional key taken away": ("~data.cache_dir", "~data.cache_dir takes a key away", "Try  data.cache_dir=null"),
    "an unknown key taken away": (
        "~training.stepps",
        "training.stepps is not a key",
        "Try  leave ~training.stepps out",
    ),
    "an unknown key of Hydra": ("hydra.verbos=true", "hydra.verbos=true is refused by Hydra", "--cfg hydra"),
    # values
    "text for a whole number": (
        "training.steps=many",
        "training.steps = many is not a whole number",
        "training.steps=10",
    ),
    "a fraction for a whole number": ("training.steps=1.5", "training.steps = 1.5 is not a whole number"),
    "a power of ten for a whole number": ("training.steps=1e3", "is not a whole number", "Try  training.steps=1000"),
    "nothing for a whole number": ("training.steps=null", "training.steps = null", "training.steps=10"),
    "text for a number": ("optimizer.lr=fast", "optimizer.lr = fast is not a number", "Try  optimizer.lr=3e-4"),
    "text for a number with a default": ("parallelism.tp=two", "is not a whole number", "Try  parallelism.tp=1\n"),
    "a list for a number": ("optimizer.betas=[0.9]", "optimizer.betas is not a key", "Try  optimizer.beta2=0.95"),
    "a number for a switch": ("training.deterministic=2", "training.deterministic = 2 is not true or false"),
    "text for a switch": ("training.deterministic=maybe", "is not true or false", "training.deterministic=true"),
    "a format that is not supported": (
        "training.param_dtype=float16",
        "training.param_dtype = float16 is none of its values",
        "There are: auto, float32, bfloat16",
    ),
    "a device that is not one": ("cluster.device=gpu", "There are: auto, cpu, cuda", "Try  cluster.device=cpu"),
    "text for a list": ("float8.filter_fqns=output", "is not a list", "Try  float8.filter_fqns=[output]"),
    "a value for a node": ("run=5", "run holds keys, not a value", "Its keys: name, dir", "Try  run.name=..."),
    "several values without a sweep": ("training.seed=1,2", "several values", "Try  --multirun training.seed=1,2"),
    "several values for a list": ("float8.filter_fqns=a,b", "several values", "float8.filter_fqns=[a,b]"),
    "several values for text": ("model.name=a,b", "several values", "'model.name=\"a,b\"'"),
    "infinity": ("optimizer.lr=inf", "optimizer.lr = inf is not a finite number", "Try  optimizer.lr=3e-4"),
    "not a number": ("optimizer.beta1=nan", "optimizer.beta1 = nan is not a finite number"),
    # the syntax
    "no value": ("training.steps", "training.steps cannot be read as an override", "Try  training.steps=..."),
    "no key": ("=5", "=5 names no key", "key=value"),
    "an open bracket": ("training.steps=[1,2", "cannot be read as an override", "'training.steps=\"[1,2\"'"),
    "an interpolation of nothing": ("training.steps=${foo.bar}", "training.steps=${foo.bar} refers to", "'foo.bar'"),
    "an interpolation of nothing in a name": ("model.name=${foo}", "model.name=${foo} refers to", "model.name=..."),
    "an environment variable that is not set": ("run.dir=${oc.env:NO_SUCH_ONE}", "NO_SUCH_ONE", "Try  run.dir=..."),
    "an unknown resolver": ("training.steps=${nope:3}", "training.steps=${nope:3}", "Try  training.steps=..."),
    "a flag that needs another": ("--resolve", "--resolve flag can only be used", "--hydra-help"),
    "a flag that is not one": ("--frobnicate", "unrecognized arguments: --frobnicate"),
    "a part of the config that is not there": ("--cfg job -p modl", "package 'modl' not found"),
    # the user's own files
    "a config folder that is not there": (
        "--config-dir nope",
        "--config-dir nope is not a folder",
        "Try  --config-dir",
    ),
    "a config name that is not there": ("--config-name nope", "there is no nope.yaml", "Try  --config-name train"),
    "a file that is not YAML": ("--config-dir mine model=broken", "mine/model/broken.yaml, line 3", "(line 1)"),
    "a file with an unknown key": (
        "--config-dir mine model=misspelt",
        "model.dimm",
        "model/misspelt.yaml",
        "model.dim",
    ),
    "a file with a wrong type": (
        "--config-dir mine model=no_number",
        "model.dim",
        "'big'",
        "correct model/no_number.yaml",
    ),
    "a file with an unknown parent": ("--config-dir mine model=orphan", "llama3_debugg", "correct model/orphan.yaml"),
    "a file that leaves keys open": (
        "--config-dir mine model=half",
        "model.n_heads is not set",
        "model.vocab_size=...",
    ),
    "an experiment with an unknown key": (
        "--config-dir mine experiment=misspelt",
        "training.stepps is not a key of titan's config   (in experiment/misspelt.yaml)",
        "training.steps",
    ),
    "a file that builds on none": (
        "--config-dir mine model=nameless",
        "model.name is not set   (in model/nameless.yaml)",
        "Try  defaults: [",
        "_self_]   as the first line of model/nameless.yaml",
    ),
    "a group for the folder of groups": (
        "--config-dir mine/model model=half",
        "--config-dir mine/model is a folder of options for model, and not one of groups",
        "Try  --config-dir mine\n",
    ),
    "an experiment of another package": (
        "--config-dir mine experiment=nested",
        "experiment/nested.yaml sets keys of the whole config, but does not say so",
        "Try  # @package _global_   as the first line of experiment/nested.yaml",
    ),
    "an experiment of another package with a choice": (
        "--config-dir mine experiment=nested_choice",
        "Try  # @package _global_   as the first line of experiment/nested_choice.yaml",
    ),
    "an experiment with an unknown model": (
        "--config-dir mine experiment=no_model",
        "model=llama3_debugg",
        "llama3_debug",
    ),
    "an experiment that is not there": ("experiment=nope", "experiment=nope is not an option", "There are: "),
    "an experiment with +": (
        "--config-dir mine +experiment=misspelt",
        "adds what is there",
        "Try  experiment=misspelt",
    ),
    "one's own option misspelt": ("hydra.searchpath=[file://mine] model=halff", "Try  model=half"),
    # the layout
    "degrees for other ranks": (
        "parallelism.dp_shard=4",
        "dp_shard 4 x cp 1 x tp 1 = 4 ranks, but the cluster has 1 node x 1 = 1 rank",
        "Try  cluster.devices_per_node=4   or  parallelism.dp_shard=-1",
    ),
    "degrees that leave a fraction": (
        "parallelism=hsdp cluster.devices_per_node=3",
        "dp_replicate 2 does not divide the world size: 1 node x 3 = 3 ranks",
        "Try  cluster.devices_per_node=2",
    ),
    "two open degrees": (
        "parallelism.dp_replicate=-1 parallelism.dp_shard=-1",
        "parallelism.dp_replicate and parallelism.dp_shard are both -1",
        "Try  parallelism.dp_replicate=1",
    ),
    "an open degree that cannot be": (
        "parallelism.tp=-1",
        "parallelism.tp = -1 is not allowed",
        "Try  parallelism.tp=1",
    ),
    "a degree of nothing": ("parallelism.cp=0", "parallelism.cp = 0 is not positive", "Try  parallelism.cp=1"),
    "a negative degree": ("parallelism.dp_shard=-2", "parallelism.dp_shard = -2", "Try  parallelism.dp_shard=1"),
    "no GPU": ("cluster.device=cuda", "this machine shows no GPU", "Try  cluster.device=cpu"),
    "two machines locally": ("cluster.nodes=2", "cluster=local is this machine alone", "cluster.devices_per_node=2"),
    "kv heads that tp does not divide": (
        "model.n_kv_heads=2 parallelism.tp=4 cluster.devices_per_node=4",
        "parallelism.tp = 4 does not divide model.n_kv_heads = 2",
        "Allowed here: 1, 2",
        "Try  parallelism.tp=2",
    ),
    "a vocabulary that tp does not divide": (
        "model.vocab_size=301 parallelism.tp=2 cluster.devices_per_node=2",
        "parallelism.tp = 2 does not divide model.vocab_size = 301",
        "Try  parallelism.tp=1",
    ),
    "a sequence that cp does not divide": (
        "training.seq_len=250 parallelism.cp=2 cluster.devices_per_node=2",
        "training.seq_len = 250 is not a multiple of 4",
        "cp 2 x 2 chunks",
        "Try  training.seq_len=248",
    ),
    "heads that cp does not divide": (
        "model.n_kv_heads=1 parallelism.cp=2 parallelism.cp_method=all_to_all cluster.devices_per_node=2",
        "parallelism.cp = 2 does not divide the 1 kv heads of a rank",
        "Try  parallelism.cp_method=allgather",
    ),
    "a ring that is compiled": (
        "parallelism.cp=2 parallelism.cp_method=ring compile=inductor cluster.devices_per_node=2",
        "torch.compile cannot trace point-to-point exchanges",
        "compile=none   or  parallelism.cp_method=allgather",
    ),
    "more stages than blocks": (
        "parallelism.pp=8 cluster.devices_per_node=8",
        "6 blocks do not fill 8 pipeline stages (1F1B)",
        "parallelism.pp=4",
    ),
    "too few pipeline microbatches": (
        "parallelism.pp=4 training.local_batch_size=2 cluster.devices_per_node=4",
        "2 pipeline microbatches are too few or uneven for pp 4",
        "Try  training.local_batch_size=4",
    ),
    "too few pipeline microbatches for two directions": (
        "parallelism.pp=2 parallelism.pp_schedule=DualPipeV training.local_batch_size=2 cluster.devices_per_node=2",
        "2 pipeline microbatches are too few or uneven for pp 2 with DualPipeV",
        "Try  training.local_batch_size=4",
    ),
    "an optimizer without eps": ("optimizer.eps=0", "optimizer.eps = 0.0 is not positive", "optimizer.eps=1e-08"),
    "pipeline microbatches that do not divide": (
        "parallelism.pp=2 parallelism.pp_microbatches=3 cluster.devices_per_node=2",
        "parallelism.pp_microbatches = 3 does not divide training.local_batch_size = 8",
        "Allowed here: 1, 2, 4, 8",
    ),
    "a stage too many": (
        "parallelism.pp=2 cluster.devices_per_node=2 "
        "parallelism.pp_modules=[[tok_embeddings],[layers.0],[norm,output]]",
        "parallelism.pp_modules has 3 stages with modules, but 1F1B with pp 2 needs 2",
        "parallelism.pp_modules=null",
    ),
    "a stage that leaves a block out": (
        "model.n_layers=2 parallelism.pp=2 parallelism.pp_modules=[[tok_embeddings,layers.0],[norm,output]] "
        "cluster.devices_per_node=2",
        "missing: layers.1",
        "The order: tok_embeddings, layers.0, ..., norm, output.",
    ),
    "stages without a pipeline": (
        "parallelism.pp_modules=[[tok_embeddings]]",
        "parallelism.pp_modules is set, but parallelism.pp = 1",
        "Try  parallelism.pp=2",
    ),
    "a schedule that is not there": (
        "parallelism.pp=2 parallelism.pp_schedule_csv=nope.csv cluster.devices_per_node=2",
        "nope.csv is not a pipeline schedule",
        "It cannot be read",
        "parallelism.pp_schedule_csv=null",
    ),
    "a schedule with a word in it": (
        "parallelism.pp=2 parallelism.pp_schedule_csv=words.csv cluster.devices_per_node=2",
        "Line 2, cell 2: 'what' is no action such as 0F0 or 1B3.",
    ),
    "a schedule without a backward pass": (
        "parallelism.pp=2 parallelism.pp_schedule_csv=forward.csv cluster.devices_per_node=2",
        "Stage 1 and microbatch 0 need one F and one B",
        "but have F 1, B 0, I 0, W 0",
    ),
    "a schedule for fewer ranks": (
        "parallelism.pp=3 parallelism.pp_schedule_csv=two.csv cluster.devices_per_node=3",
        "two.csv is for 2 ranks",
        "Try  parallelism.pp=2",
    ),
    "a schedule for fewer microbatches": (
        "parallelism.pp=2 parallelism.pp_schedule_csv=two.csv cluster.devices_per_node=2",
        "8 pipeline microbatches, but",
        "Try  training.local_batch_size=1",
    ),
    "CUDA graphs on a CPU": (
        "compile=inductor compile.mode=reduce_overhead",
        "compile.mode = reduce_overhead takes CUDA graphs, but cluster.device = cpu",
        "Try  compile.mode=default",
    ),
    "CUDA graphs in a pipeline, and of weights that come and go": (
        "cluster=simulated cluster.device=cuda cluster.devices_per_node=2 compile=inductor compile.mode=max_autotune "
        "parallelism.pp=2 parallelism.cpu_offload=true",
        "compile.mode = max_autotune takes CUDA graphs, but parallelism.pp = 2",
        "compile.mode = max_autotune takes CUDA graphs, but parallelism.cpu_offload = true",
        "Try  compile.mode=default   or  compile.mode=max_autotune_no_cudagraphs",
    ),
    "a budget without a compiler": (
        "activation_checkpoint=memory_budget",
        "It is the compiler that chooses what to keep.",
        "compile=inductor   or  activation_checkpoint=selective",
    ),
    "a budget of more than all": (
        "activation_checkpoint=memory_budget activation_checkpoint.memory_budget=2 compile=inductor",
        "activation_checkpoint.memory_budget = 2.0 is not a share",
    ),
    "asynchronous tensor parallel on a CPU": (
        "parallelism.async_tp=true parallelism.tp=2 cluster.devices_per_node=2",
        "compile.enable = false, and it is the compiler that overlaps",
        "cluster.device = cpu, and its kernels are for CUDA",
        "Try  parallelism.async_tp=false",
    ),
    "a rank that is not simulated": (
        "cluster=simulated cluster.simulated_rank=8",
        "cluster.simulated_rank = 8 is none of the 8 ranks",
        "Try  cluster.simulated_rank=7",
    ),
    "a family that is none": (
        "model.family=gpt",
        "model.family = gpt is no model family",
        "Try  model.family=llama",
    ),
    "a family of a module that is not there": (
        "model.family=my_gptt:MINE",
        "model.family = my_gptt:MINE, but there is no module my_gptt",
        "on PYTHONPATH",
    ),
    "a family of a package without the module": (
        "model.family=titan.models.nope:MINE",
        "there is no module titan.models.nope",
    ),
    "no process": ("cluster.devices_per_node=0", "is not positive", "Try  cluster.devices_per_node=1"),
    # the model
    "heads that do not divide the width": ("model.n_heads=7", "Allowed here: 1, 2, 4", "Try  model.n_heads=8"),
    "heads of odd width": ("model.n_heads=256", "into even heads", "Try  model.n_heads=128"),
    "an odd width": ("model.dim=33", "which an odd width has not", "Try  model.dim=32"),
    "kv heads that do not divide the heads": ("model.n_kv_heads=3", "Allowed here: 1, 2, 4", "Try  model.n_kv_heads=2"),
    "no heads": ("model.n_heads=0", "model.n_heads = 0 is below 1", "Try  model.n_heads=1"),
    "no stretching": ("model=llama3_8b model.rope_scaling.factor=0", "model.rope_scaling.factor = 0.0 is not positive"),
    "bands that cross": ("model=llama3_8b model.rope_scaling.low_freq_factor=9", "not below high_freq_factor = 4.0"),
    # the loop
    "a row longer than the context": ("training.seq_len=1000000", "model.max_seq_len", "Try  training.seq_len=131072"),
    "an empty row": ("training.seq_len=0", "training.seq_len = 0 is below 1", "Try  training.seq_len=1"),
    "a batch that does not divide": ("training.global_batch_size=13", "not a multiple of 8", "global_batch_size=16"),
    "an empty batch": ("training.global_batch_size=0", "is not a number of rows", "training.global_batch_size=-1"),
    "an empty micro-batch": ("training.local_batch_size=0", "is below 1", "Try  training.local_batch_size=1"),
    "negative steps": ("training.steps=-5", "training.steps = -5 is below 1", "Try  training.steps=1"),
    "a decay longer than the run": ("lr_scheduler.decay_ratio=2", "is not a share", "from 0 to 1", "decay_ratio=0.9"),
    "a moment that never decays": ("optimizer.beta2=1", "is not a share", "from 0 to below 1", "optimizer.beta2=0.9"),
    "a negative learning rate": ("optimizer.lr=-1", "optimizer.lr = -1.0 is below 0"),
    "a value for the keys of Weights & Biases": (
        "metrics.wandb=true",
        "metrics.wandb = true, but metrics.wandb holds keys",
        "Try  metrics.wandb.enable=...",
    ),
    "a mode that Weights & Biases has not": ("metrics.wandb.mode=on", "There are: online, offline"),
    "a run in no project": (
        "metrics=wandb metrics.wandb.mode=offline metrics.wandb.project=''",
        "metrics.wandb.project is empty",
        "Try  metrics.wandb.project=titan",
    ),
    "a trace after the end": ("profiling=trace training.steps=5", "looks at steps 10 to 12", "profiling.start_step=2"),
    "a snapshot of a CPU's memory": (
        "profiling=memory training.steps=20 cluster.device=cpu",
        "profiling.memory_snapshot = true, but cluster.device = cpu",
        "PyTorch remembers who holds memory on CUDA only",
        "Try  profiling.memory_snapshot=false   or  profiling=trace",
    ),
    "a snapshot after the end": (
        "profiling=memory training.steps=5",
        "profiling looks at steps 10 to 12",
        "profiling.start_step=2",
    ),
    "a compiled update alone": (
        "compile.optimizer=true",
        "compile.optimizer = true, but compile.enable = false",
        "Try  compile=inductor   or  compile.optimizer=false",
    ),
    "moments in a format that is not one": ("optimizer.state_dtype=float8", "There are: auto, float32, bfloat16"),
    "a trace of a single step": ("profiling=trace training.steps=1", "but training.steps = 1", "profiling=none"),
    "blocks beyond the last": (
        "activation_checkpoint=every_nth activation_checkpoint.every=100",
        "exceeds model.n_layers = 6",
        "activation_checkpoint.every=2",
    ),
    "cuDNN on a CPU": ("training.attention=cudnn", "but cluster.device = cpu", "Try  training.attention=default"),
    "FlexAttention on a CPU": (
        "training.attention=flex",
        "has no backward pass on a CPU",
        "training.attention=default",
    ),
    "FlashAttention 3 on a CPU": (
        "training.attention=flash3",
        "but cluster.device = cpu",
        "training.attention=default",
    ),
    "titan's kernel for CPUs on a GPU": (
        "cluster=simulated training.attention=cpu",
        "training.attention = cpu, but cluster.device = cuda",
        "Try  training.attention=default",
    ),
    "titan's kernel for CPUs with heads that fill nothing": (
        "training.attention=cpu model=llama3_debug model.n_heads=128 model.n_kv_heads=128",
        "a head has 2 numbers (model.dim / model.n_heads)",
        "Try  training.attention=default",
    ),
    "titan's kernel for CPUs in a ring": (
        "training.attention=cpu cluster.devices_per_node=2 parallelism.cp=2 parallelism.cp_method=ring",
        "training.attention = cpu together with parallelism.cp_method = ring",
        "parallelism.cp_method=allgather",
    ),
    "an unknown kernel": ("training.attention=flashh", "training.attention = flashh", "training.attention=flash"),
    "FlexAttention without documents": (
        "cluster=simulated training.attention=flex",
        "training.attention = flex, but data.mask_documents = false",
        "Try  training.attention=default   or  data.mask_documents=true",
    ),
    "flash attention over documents": (
        "cluster=simulated training.attention=flash data.mask_documents=true",
        "training.attention = flash, but data.mask_documents = true",
        "Try  training.attention=flex   or  data.mask_documents=false",
    ),
    "flash attention in float32": (
        "cluster=simulated training.attention=flash training.param_dtype=float32",
        "training.attention = flash, but training.param_dtype = float32",
        "Try  training.param_dtype=bfloat16   or  training.attention=efficient",
    ),
    "a ring of another kernel": (
        "training.attention=math parallelism.cp=2 parallelism.cp_method=ring cluster.devices_per_node=2",
        "training.attention = math together with parallelism.cp_method = ring",
        "Try  training.attention=default   or  parallelism.cp_method=allgather",
    ),
    "cuDNN and the same bits": (
        "cluster=simulated training.attention=cudnn training.deterministic=true",
        "training.attention = cudnn, but training.deterministic = true",
        "Try  training.attention=flash   or  training.deterministic=false",
    ),
    "float8's small linears among names": (
        "float8=rowwise float8.emulate=true float8.filter_fqns=[wk,auto_filter_small_kn]",
        "an option of its own",
        "Try  float8.auto_filter_small_kn=true",
    ),
    "no rule for small linears": (
        "float8=rowwise_with_gw_hp float8.emulate=true float8.auto_filter_small_kn=true",
        "torchao has no such rule",
        "float8.auto_filter_small_kn=false   or  float8=rowwise",
    ),
    "a float8 gathering of rows' scales": (
        "float8=rowwise float8.emulate=true float8.fsdp_all_gather=true cluster.devices_per_node=2",
        "one scale for the whole tensor",
        "float8=tensorwise   or  float8.fsdp_all_gather=null",
    ),
    "a float8 gathering without float8": ("float8.fsdp_all_gather=true", "but float8=none", "Try  float8=tensorwise"),
    "a float8 gathering from the CPU's memory": (
        "float8=tensorwise float8.emulate=true float8.fsdp_all_gather=true parallelism.cpu_offload=true "
        "cluster.devices_per_node=2",
        "but parallelism.cpu_offload = true",
        "Try  float8.fsdp_all_gather=false",
    ),
    "a float8 gathering of one rank": (
        "float8=tensorwise float8.emulate=true float8.fsdp_all_gather=true cluster.devices_per_node=2 "
        "parallelism=fsdp_tp parallelism.tp=2",
        "but dp_shard x cp = 1",
        "Try  float8.fsdp_all_gather=null",
    ),
    "scales before no float8 gathering": (
        "float8=tensorwise float8.emulate=true float8.precompute_scales=true",
        "not gathered in float8",
        "Try  float8.precompute_scales=null",
    ),
    "positions that float8 cannot multiply": (
        "float8=tensorwise float8.emulate=false training.seq_len=250 training.local_batch_size=1",
        "1 rows x 250 tokens = 250 positions",
        "training.seq_len=256   or  float8=rowwise_with_gw_hp",
    ),
    "float8 on a CPU": ("float8=rowwise", "needs a GPU with float8", "Try  float8=none   or  float8.emulate=true"),
    # files
    "weights that are not there": ("checkpoint.initial_load=nope", "nope is not a folder", "checkpoints/step_"),
    "weights of another shape": (
        "checkpoint.initial_load=weights model.n_layers=3",
        "model.n_layers = 3, and it was saved with 2",
        "Try  model.dim=64 model.n_layers=2 model.n_heads=8 model.n_kv_heads=4 model.ffn_dim=96 model.vocab_size=300",
    ),
    "a checkpoint of another shape": (
        "checkpoint.initial_load=step_00000004 model.n_heads=8",
        "model.n_heads = 8, and it was saved with 16",
        "Try  model.n_heads=16",
    ),
    "a step without checkpoints": ("checkpoint=disabled checkpoint.load_step=4", "resumes nothing", "checkpoint=async"),
    "no data path": ("data=text", "data.path is not set, but data=text needs it", "Try  data.path="),
    "an empty data path": ("data=jsonl data.path=", "data.path is not set, but data=jsonl needs it", "*.jsonl"),
    "a data path that is not there": (
        "data=text data.path=nope",
        "does not exist or matches nothing",
        "data.path=/path",
    ),
    "a glob that matches nothing": ("data=text data.path=documents/*.json", "matches nothing", "glob"),
    "a folder without files": (
        "data=text data.path=folder_without_files",
        "holds no file to read",
        "data=python_stdlib",
    ),
    "a folder without files of the kind": (
        "data=jsonl data.path=documents",
        "holds no file to read",
        "data.path=/path",
    ),
    "a file in a compression that is not read": (
        "data=jsonl data.path=compressed validation=text validation.data.path=documents",
        "compressed/a.jsonl.bz2 is in a compression that is not read",
        "Try  bunzip2 ",
    ),
    "files of another kind": (
        "data=parquet data.path=records.jsonl",
        "holds jsonl by its name, but data=parquet reads none",
        "Try  data=jsonl",
    ),
    "held-out files of another kind": (
        "validation=jsonl validation.data.path=records.parquet",
        "holds parquet by its name",
        "Try  validation=parquet",
    ),
    "a field that the records have not": (
        "data=jsonl data.path=records.jsonl",
        "data.text_field = text, but the first record of",
        "It has: id, content",
        "Try  data.text_field=content",
    ),
    "messages that the records have not": (
        "data=jsonl data.format=chat data.path=records.jsonl",
        "data.messages_field = messages, but the first record of",
        "Try  data.messages_field=...",
    ),
    "empty files": ("data=text data.path=folder_of_empty_files", "2 files, all of them empty", "data=python_stdlib"),
    "a path that is not read": (
        "data.path=documents",
        "data=python_stdlib reads Python's own",
        "Try  data=text data.path=",
    ),
    # what is validated on
    "no held-out text": (
        "validation.interval=10",
        "no held-out text is chosen",
        "Try  validation=text validation.data",
    ),
    "held-out text of no kind": (
        "validation.data.path=documents",
        "held-out text, of which no kind is chosen",
        "text",
        "Try  validation=text validation.data.path=documents",
    ),
    "no path of held-out text": ("validation=text", "validation.data.path is not set", "Try  validation.data.path="),
    "held-out text that is not there": (
        "validation=jsonl validation.data.path=nope",
        "does not exist or matches nothing",
        "or  validation=none",
    ),
    "empty held-out text": (
        "validation=text validation.data.path=folder_of_empty_files",
        "holds 2 files, all of them empty",
        "Try  validation.data.path=",
    ),
    "a held-out dataset without a name": (
        "validation=huggingface",
        "validation.data.dataset is not set",
        "Try  validation.data.dataset=",
    ),
    "held-out text that is trained on": (
        "data=text data.path=documents validation=text validation.data.path=documents",
        "that data trains on",
        "Try  data.path=/path/without/them",
    ),
    "the default text held out of itself": ("validation=python_stdlib", "that data trains on", "Try  validation=text"),
    "a mixture held out": ("validation=text validation.data.kind=mixture", "held-out text is one source"),
    "a negative interval": ("validation.interval=-1", "validation.interval = -1 is below 0"),
    "no rows": ("validation.rows=0", "validation.rows = 0 is not a number of rows", "Try  validation.rows=-1"),
    "no tokenizer": ("tokenizer=tiktoken", "tokenizer.path is not set", "tokenizer=bytes"),
    "a tokenizer that is not there": ("tokenizer=tiktoken tokenizer.path=nope", "is not a file", "tokenizer=bytes"),
    "a garbled tokenizer": (
        "tokenizer=tiktoken tokenizer.path=garbled.model",
        "Line 1 is not a token",
        "tokenizer=bytes",
    ),
    "an empty tokenizer": ("tokenizer=tiktoken tokenizer.path=empty.model", "It is empty", "tokenizer=bytes"),
    "a tokenizer that is not read": (
        "tokenizer.path=tokenizer.model",
        "tokenizer=bytes reads no file",
        "Try  tokenizer=tiktoken tokenizer.path=",
    ),
    "more tokens than rows": (
        "tokenizer=tiktoken tokenizer.path=tokenizer.model model.vocab_size=300",
        "tokenizer=tiktoken has 512 tokens, but model.vocab_size = 300",
        "Try  model.vocab_size=512",
    ),
    "more tokens than rows, of the package": (
        "tokenizer=llama3",
        "tokenizer=llama3 has 128,256 tokens, but model.vocab_size = 2,048",
        "Try  model.vocab_size=128256",
    ),
    "more tokens than rows, of a tokenizer.json": (
        "tokenizer=huggingface tokenizer.path=tokenizer.json",
        "tokenizer=huggingface has 5,001 tokens, but model.vocab_size = 2,048",
        "Try  model.vocab_size=5001",
    ),
    "a tokenizer of another kind": (
        "tokenizer=sentencepiece tokenizer.path=tokenizer.model",
        "is not a SentencePiece model",
        "Try  tokenizer=tiktoken tokenizer.path=",
    ),
    "a folder without a tokenizer": (
        "tokenizer=huggingface tokenizer.path=documents",
        "holds no tokenizer.json",
        "Try  tokenizer.path=/path/to/folder/with/tokenizer.json",
    ),
    "a tokenizer that the package brings": (
        "tokenizer=llama3 tokenizer.path=tokenizer.model",
        "tokenizer=llama3 reads the file that llama-models ships",
        "Try  tokenizer=tiktoken tokenizer.path=",
    ),
    "another tokenizer than was said": (
        "tokenizer.fingerprint=0123",
        "tokenizer=bytes is not the tokenizer with tokenizer.fingerprint = 0123",
        "tokenizer.fingerprint=null",
    ),
    "a run directory without a name": ("run.dir=", "run.dir is empty", "Try  run.dir=runs/NAME"),
    "a run directory that is a file": ("run.dir=a_file", "a_file cannot be written", "Try  run.dir="),
    "a run directory below a file": ("run.dir=a_file/run", "a_file/run cannot be written", "Try  run.dir="),
    "a run directory that nobody can write": ("run.dir=/proc/run", "/proc/run cannot be written", "Try  run.dir="),
    # a sweep
    "an unknown option in a sweep": (
        "--multirun model=llama3_debug,nope",
        "model=nope is not an option",
        "There are: ",
    ),
    "an unknown key in a sweep": ("--multirun training.stepps=1,2", "1 problem", "training.steps=2"),
    "a wrong value in a sweep": ("--multirun training.seed=1,x", "training.seed = x is not a whole number"),
    "a wrong value beside a sweep": ("--multirun training.seed=1,2 training.steps=x", "1 problem", "training.steps=10"),
    "a rule broken at one point": (
        "--multirun training.steps=2,-1,3",
        "training.steps = -1 is below 1   (at 1 of 3 points: training.steps=-1)",
    ),
    "no point": ("--multirun model=glob(nope*)", "the sweep has no point", "glob()"),
    "a sweep asked for by Hydra's own key": (
        "hydra.mode=MULTIRUN training.seed=1,x",
        "1 problem",
        "training.seed = x is",
    ),
    "a rule broken at every point": ("--multirun training.seed=range(1,3) training.steps=-1", "1 problem", "below 1\n"),
}
"""By what is wrong: what is typed, and the words that the answer has to have."""


@pytest.mark.parametrize(("typed", "words"), [(text, words) for text, *words in MISTAKES.values()], ids=MISTAKES.keys())
def test_a_mistake_is_told_and_changes_nothing(titan: Command, here: Path, typed: str, words: list[str]) -> None:
    """Every mistake: exit code 2, no traceback, the words that help, and not one file made or changed."""
    before = files_below(here)
    finished = titan(*typed.split())
    assert finished.code == 2
    assert "Traceback" not in finished.text
    for word in words:
        assert word in finished.err
    assert finished.out == ""
    assert files_below(here) == before


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("model=llama3_8bb", "Try  model=llama3_8b"),
        ("+training.stepps=5", "Try  training.steps=5"),
        ("training.steps=[1", "cannot be read as an override"),
        ("model=null", "model=null is not an option"),
        ("run.name=${foo.bar}", "run.name=${foo.bar} refers to something that is not there"),
        ("--multirun training.steps=-1,2", "(at 1 of 2 points: training.steps=-1)"),
    ],
)
def test_a_mistake_in_a_shell_is_told_the_same_way(titan_process: Command, here: Path, typed: str, words: str) -> None:
    """What a shell sees is what the entry point said: the code, the words, and nothing of Hydra's around them."""
    before = files_below(here)
    finished = titan_process(*typed.split())
    assert finished.code == 2
    assert finished.err.startswith("1 problem in the composed config\n")
    assert words in finished.err
    assert "Traceback" not in finished.text
    assert finished.out == ""
    assert files_below(here) == before


def test_all_mistakes_of_a_command_line_are_told_together(titan: Command) -> None:
    """One message has every mistake: of the syntax, the groups, the keys, the types, the rules and the files."""
    finished = titan(
        *("model=nope", "training.stepps=5", "+colour=blue", "training.steps=many", "parallelism.tp=-1"),
        *("data=text", "tokenizer=tiktoken", "optimizer.beta2=1", "model.name=(", "data.num_workers=-1"),
    )
    assert finished.code == 2
    assert finished.err.startswith("10 problems in the composed config\n")
    for word in (
        "model=nope is not an option",
        "training.stepps is not a key",
        "colour is not a key",
        "training.steps = many is not a whole number",
        "parallelism.tp = -1 is not allowed",
        "data.path is not set",
        "tokenizer.path is not set",
        "optimizer.beta2 = 1.0 is not a share",
        "model.name=( cannot be read as an override",
        "data.num_workers = -1 is below 0",
    ):
        assert word in finished.err


def test_a_mistake_beside_ones_own_groups_does_not_accuse_them(titan: Command) -> None:
    """Options found through --config-dir or hydra.searchpath are known wherever mistakes are explained."""
    for own in (["--config-dir", "mine"], ["hydra.searchpath=[file://mine]"]):
        finished = titan(*own, "model=half", "training.stepps=5")
        assert "training.stepps is not a key" in finished.err
        assert "is not an option" not in finished.err


@pytest.fixture
def run_directory(here: Path, trained: Path) -> Path:
    """A copy of a complete run."""
    return Path(shutil.copytree(trained, here / "run"))


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (
            ["model.dim=64", "model.ffn_dim=128"],
            [
                "1 problem",
                "holds a run with other model settings",
                "model.dim=64, but the run has model.dim=32",
                "model.dim=32 model.ffn_dim=64   or  run.dir=ANOTHER",
            ],
        ),
        (
            ["training.seed=7"],
            ["training.seed=7, but the run has training.seed=0", "Try  training.seed=0   or  run.dir="],
        ),
        (["data.path=documents"], ["holds a run with other data settings", "fox.txt"]),
        (["training.seed=7", "model.dim=64"], ["2 problems", "training settings", "model settings"]),
    ],
    ids=["another model", "another seed", "other data", "several"],
)
def test_a_run_is_not_continued_by_another(
    titan: Command, run_directory: Path, text_file: Path, typed: list[str], words: list[str]
) -> None:
    """A directory keeps its run: what decides weights or data is refused, and nothing of the run is touched."""
    before = files_below(run_directory)
    config = (run_directory / "config.yaml").read_text()
    finished = titan(*TINY, f"data.path={text_file}", "run.dir=run", "training.steps=4", *typed)
    assert finished.code == 2
    assert "Traceback" not in finished.text
    for word in words:
        assert word in finished.err
    assert files_below(run_directory) == before
    assert (run_directory / "config.yaml").read_text() == config


def test_a_run_that_is_not_continued_says_how_it_was_started(
    titan: Command, run_directory: Path, text_file: Path
) -> None:
    """What was typed can be pasted, so that nobody has to remember all of it to go on; where it is known."""
    finished = titan("run.dir=run")
    assert finished.code == 2
    (line,) = (line for line in finished.err.splitlines() if "It was started with: " in line)
    typed = shlex.split(line.partition("with: ")[2])
    again = titan(*(each for each in typed if not each.startswith("run.dir=")), "run.dir=run")
    assert again.code == 0
    assert "this run is complete" in again.text
    (run_directory / "overrides.yaml").unlink()
    assert "It was started with" not in titan("run.dir=run").err


def test_a_run_directory_with_an_unreadable_config_is_left_alone(titan: Command, run_directory: Path) -> None:
    """A config.yaml that is not titan's, or another version's, is refused and not overwritten."""
    for text in ("colour: blue\n", "a list\n", "{", "training:\n  stepps: 4\n"):
        (run_directory / "config.yaml").write_text(text)
        finished = titan("run.dir=run")
        assert finished.code == 2
        assert "config.yaml" in finished.err
        assert "Try  run.dir=ANOTHER" in finished.err
        assert (run_directory / "config.yaml").read_text() == text


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "0"}, ["RANK is set in the environment, but not WORLD_SIZE", "MASTER_ADDR", "unset RANK"]),
        (
            {"RANK": "one", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
            ["RANK = one in the environment is not a number", "unset RANK"],
        ),
        (
            {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
            ["contradict each other", "RANK=2 WORLD_SIZE=2", "unset RANK"],
        ),
    ],
    ids=["incomplete", "no numbers", "contradictory"],
)
def test_a_launcher_that_set_half_a_rank_is_told(
    titan: Command, here: Path, variables: dict[str, str], words: list[str]
) -> None:
    """A process that is neither a rank nor free of a launcher's variables says which are missing, and how to go on."""
    before = files_below(here)
    finished = titan(**variables)
    assert finished.code == 2
    assert "Traceback" not in finished.text
    for word in words:
        assert word in finished.err
    assert files_below(here) == before
