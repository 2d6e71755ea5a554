"""A TorchTitan config becomes a titan command line that trains the same, held against the package torchtitan itself."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import clean_environment
from tests.support.configs import compose
from titan.config.keys import is_known
from titan.config.load import option_groups
from titan.config.schema import TitanConfig
from titan.convert.__main__ import main
from titan.convert.toml import Translation, read_toml, translate
from titan.convert.torchtitan_options import OPTIONS
from titan.convert.torchtitan_rules import FLAVORS, N_LAYERS, Given, NoEquivalent
from titan.errors import CommandError
from titan.optim.schedule import lr_factor

from . import torchtitan_package

RECIPES = {
    "debugmodel": """
        model = {flavor = "debugmodel", hf_assets_path = "./tests/assets/tokenizer"}
        metrics = {log_freq = 1}
        optimizer = {lr = 8e-4}
        lr_scheduler = {warmup_steps = 2, decay_ratio = 0.8, decay_type = "linear", min_lr_factor = 0.0}
        training = {local_batch_size = 8, seq_len = 2048, steps = 10, dataset = "c4_test"}
        checkpoint = {enable = false, interval = 10, last_save_model_only = false}
        activation_checkpoint = {mode = "selective", selective_ac_option = "2"}
        validation = {enable = false, dataset = "c4_validation", freq = 5, steps = 10}
    """,
    "8B": """
        model = {name = "llama3", flavor = "8B", hf_assets_path = "./assets/hf/Llama-3.1-8B"}
        profiling = {enable_profiling = true, save_traces_folder = "profile_trace", profile_freq = 100}
        metrics = {log_freq = 10, enable_tensorboard = true, save_tb_folder = "tb"}
        optimizer = {name = "AdamW", lr = 3e-4, eps = 1e-8}
        training = {local_batch_size = 1, seq_len = 8192, max_norm = 1.0, steps = 1000, dataset = "c4"}
        activation_checkpoint = {mode = "selective", selective_ac_option = "op"}
        compile = {enable = false, components = ["model", "loss"]}
        validation = {enable = false, dataset = "c4_validation", freq = 500, steps = -1}
    """,
    "70B": """
        model = {flavor = "70B", hf_assets_path = "./assets/hf/Llama-3.1-70B"}
        optimizer = {lr = 1.5e-4}
        training = {local_batch_size = 8, seq_len = 8192, steps = 1000, dataset = "c4"}
        parallelism = {data_parallel_shard_degree = -1, tensor_parallel_degree = 8}
        checkpoint = {enable = true, interval = 250, async_mode = "async_with_pinned_mem", keep_latest_k = 4}
        activation_checkpoint = {mode = "full"}
        validation = {enable = true, dataset = "c4_validation", freq = 500, steps = -1, seq_len = 8192}
    """,
    "405B": """
        model = {flavor = "405B", hf_assets_path = "./assets/hf/Llama-3.1-405B", converters = ["float8"]}
        optimizer = {lr = 8e-5}
        lr_scheduler = {warmup_steps = 600}
        training = {local_batch_size = 2, seq_len = 8192, steps = 3000, dataset = "c4"}
        parallelism = {tensor_parallel_degree = 8, enable_async_tensor_parallel = true, pipeline_parallel_degree = 1}
        activation_checkpoint = {mode = "full"}
        compile = {enable = true, components = ["model", "loss"]}
        [quantize.linear.float8]
        enable_fsdp_float8_all_gather = true
        precompute_float8_dynamic_scale_for_fsdp = true
        filter_fqns = ["output"]
    """,
    "four axes": """
        model = {flavor = "8B", converters = ["float8"]}
        training = {local_batch_size = 8, global_batch_size = 64, seq_len = 4096, steps = 50, enable_cpu_offload = true}
        optimizer = {weight_decay = 0.0, beta1 = 0.8, beta2 = 0.99, eps = 1e-6}
        lr_scheduler = {warmup_steps = 99, decay_type = "cosine", min_lr_factor = 0.1}
        metrics = {log_freq = 3}
        debug = {seed = 7, deterministic = true}
        [parallelism]
        data_parallel_replicate_degree = 2
        data_parallel_shard_degree = 2
        context_parallel_degree = 2
        tensor_parallel_degree = 2
        pipeline_parallel_degree = 2
        pipeline_parallel_schedule = "Interleaved1F1B"
        pipeline_parallel_layers_per_stage = 9
        pipeline_parallel_microbatch_size = 2
        fsdp_reshard_after_forward = "never"
        disable_loss_parallel = true
        [quantize.linear.float8]
        recipe_name = "rowwise_with_gw_hp"
    """,
}
"""Recipes of the sort that TorchTitan ships and documents, in fewer lines."""


def write(folder: Path, text: str) -> Path:
    """Write a TOML file; each line of the recipes is a table of its own."""
    path = folder / "config.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_the_same(name: str, tmp_path: Path) -> None:
    """Shape, degrees, batch, schedule and optimizer of the composed config are those that TorchTitan reads itself."""
    path = write(tmp_path, RECIPES[name])
    theirs = torchtitan_package.read(tomllib.loads(path.read_text()))
    translation = translate(path)
    assert translation.refusal is None
    assert translation.config is not None
    assert facts(translation.config) == their_facts(theirs)


def facts(config: TitanConfig) -> dict[str, Any]:
    """Return what decides how a run of titan goes."""
    training, parallelism, optimizer = config.training, config.parallelism, config.optimizer
    decays = optimizer.weight_decay != 0
    return {
        "degrees": [parallelism.pp, parallelism.dp_replicate, parallelism.dp_shard, parallelism.cp, parallelism.tp],
        "shape": [getattr(config.model, name) for name in SHAPE],
        "batch": [training.local_batch_size, training.global_batch_size, training.seq_len, training.steps],
        "optimizer": [optimizer.lr, optimizer.beta1, optimizer.beta2, optimizer.eps, optimizer.weight_decay],
        "decays all": decays == optimizer.decay_embeddings == optimizer.decay_norms,
        "schedule": [lr_factor(step, training.steps, config.lr_scheduler) for step in range(training.steps)],
        "clip": training.max_grad_norm,
        "log": config.metrics.log_every,
        "recompute": config.activation_checkpoint.mode.name,
        "compile": config.compile.enable,
        "float8": config.float8.recipe.name,
        "async tp": parallelism.async_tp,
        "loss parallel": parallelism.loss_parallel,
        "reshard": parallelism.reshard_after_forward.name,
        "offload": parallelism.cpu_offload,
        "schedule of stages": parallelism.pp_schedule.name,
        "rows of a piece": training.local_batch_size // parallelism.pp_microbatches
        if parallelism.pp_microbatches > 0
        else 1,
        "checkpoint": config.checkpoint.mode.name,
        "interval": config.checkpoint.interval if config.checkpoint.mode.name != "disabled" else None,
        "deterministic": training.deterministic,
    }


SHAPE = ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size", "rope_theta", "norm_eps")


def their_shape(flavor: str) -> list[Any]:
    """Return the numbers of a flavor, its feed-forward width computed as TorchTitan's model does."""
    given = {"vocab_size": 128256, "norm_eps": 1e-5, "ffn_dim_multiplier": 1, "multiple_of": 256}
    given |= torchtitan_package.llama3_shapes()[flavor]
    width = int(int(2 * 4 * given["dim"] / 3) * given["ffn_dim_multiplier"])
    given["ffn_dim"] = -(-width // given["multiple_of"]) * given["multiple_of"]
    given.setdefault("n_kv_heads", given["n_heads"])
    return [given[name] for name in SHAPE]


def their_facts(job: Any) -> dict[str, Any]:
    """Return what decides how a run of TorchTitan goes, in the same order."""
    training, parallelism, optimizer = job.training, job.parallelism, job.optimizer
    steps, warmup = training.steps, min(job.lr_scheduler.warmup_steps, training.steps)
    ratio = job.lr_scheduler.decay_ratio
    decay = min(steps - warmup, steps - warmup if ratio is None else round(steps * ratio))
    shape = (warmup, steps + 1 - warmup - decay, decay, job.lr_scheduler.decay_type, job.lr_scheduler.min_lr_factor)
    recompute = job.activation_checkpoint
    modes = {"disabled": "sync", "async": "async", "async_with_pinned_mem": "async_pinned"}
    return {
        "degrees": [
            parallelism.pipeline_parallel_degree,
            parallelism.data_parallel_replicate_degree,
            parallelism.data_parallel_shard_degree,
            parallelism.context_parallel_degree,
            parallelism.tensor_parallel_degree,
        ],
        "shape": their_shape(job.model.flavor),
        "batch": [training.local_batch_size, training.global_batch_size, training.seq_len, steps],
        "optimizer": [optimizer.lr, optimizer.beta1, optimizer.beta2, optimizer.eps, optimizer.weight_decay],
        "decays all": True,
        "schedule": pytest.approx([torchtitan_package.schedule()(step, *shape) for step in range(steps)]),
        "clip": training.max_norm,
        "log": job.metrics.log_freq,
        "recompute": "every_nth"
        if recompute.mode == "selective" and recompute.selective_ac_option != "op"
        else recompute.mode,
        "compile": job.compile.enable,
        "float8": job.quantize.linear.float8.recipe_name or "tensorwise" if job.model.converters else "none",
        "async tp": parallelism.enable_async_tensor_parallel,
        "loss parallel": not parallelism.disable_loss_parallel,
        "reshard": parallelism.fsdp_reshard_after_forward,
        "offload": training.enable_cpu_offload,
        "schedule of stages": parallelism.pipeline_parallel_schedule,
        "rows of a piece": parallelism.pipeline_parallel_microbatch_size,
        "checkpoint": modes[job.checkpoint.async_mode] if job.checkpoint.enable else "disabled",
        "interval": job.checkpoint.interval if job.checkpoint.enable else None,
        "deterministic": job.debug.deterministic,
    }


def test_the_table_has_every_option_of_the_package_with_its_default() -> None:
    """No option of TorchTitan is left out, none is invented, and what a file leaves out is what TorchTitan takes."""
    assert {option.name: option.default for option in OPTIONS} == torchtitan_package.defaults()


def test_the_flavors_are_the_packages() -> None:
    """Every flavor of the package has an option of titan's, and as many blocks."""
    shapes = torchtitan_package.llama3_shapes()
    assert {name.partition("_")[0]: shape["n_layers"] for name, shape in shapes.items()} == N_LAYERS
    assert N_LAYERS.keys() == FLAVORS.keys()


def given(values: dict[str, Any]) -> Given:
    """Return all options, some of them with other values."""
    return Given({option.name: option.default for option in OPTIONS} | values, frozenset(values), 4)


OTHER_VALUES: dict[str, list[Any]] = {
    "model.flavor": ["8B_flex", "70B", "405B", "debugmodel_varlen_attn"],
    "optimizer.name": ["Adam"],
    "training.dataset": ["c4", "mine"],
    "lr_scheduler.decay_type": ["cosine", "sqrt"],
    "activation_checkpoint.mode": ["none", "full", "memory_budget", "other"],
    "parallelism.pipeline_parallel_schedule": ["zbvzerobubble", "PipelineScheduleMulti"],
    "parallelism.context_parallel_rotate_method": ["alltoall", "other"],
    "parallelism.fsdp_reshard_after_forward": ["always"],
    "checkpoint.export_dtype": ["bfloat16", "float16"],
    "checkpoint.async_mode": ["async"],
    "comm.mode": ["fake_backend", "local_tensor"],
    "training.mixed_precision_param": ["float32"],
}
SWITCHES = {
    "checkpoint.enable": True,
    "checkpoint.initial_load_path": "/weights",
    "checkpoint.initial_load_in_hf": True,
    "validation.enable": True,
    "parallelism.pipeline_parallel_degree": 2,
    "model.converters": ["float8"],
    "profiling.enable_profiling": True,
}


def other_values(option: Any) -> list[Any]:
    """Return values of an option that are not its default."""
    if option.name in OTHER_VALUES:
        return OTHER_VALUES[option.name]
    kinds = option.kinds or (type(option.default),)
    samples = {bool: [not option.default], int: [2, 3], float: [0.25], str: ["other"], list: [["other"]]}
    return [value for kind in kinds for value in samples.get(kind, [])]


@pytest.mark.parametrize("switches", [{}, SWITCHES], ids=["as they are", "with all switches on"])
def test_an_option_sets_only_the_keys_that_the_table_names(switches: dict[str, Any]) -> None:
    """What the documentation says of an option is all that it does, and every key of it is titan's."""
    groups = option_groups()
    for option in OPTIONS:
        assert all(key in groups or is_known(key) for key in option.keys), option.name
        for value in [option.default, *other_values(option)]:
            try:
                done = option.apply(given(switches | {option.name: value}))
            except NoEquivalent:
                continue
            assert set(done) <= set(option.keys), (option.name, done)


def test_every_option_says_where_it_went() -> None:
    """An option without a key has a reason."""
    assert [option.name for option in OPTIONS if not option.keys and not option.note] == []


def translated(folder: Path, text: str, ranks: int | None = None) -> Translation:
    """Translate a text."""
    return translate(write(folder, text), ranks)


def test_what_has_no_equivalent_is_said_and_what_makes_no_difference_is_not(tmp_path: Path) -> None:
    """An option that is off in TorchTitan, or whose feature is, needs no equivalent."""
    quiet = translated(tmp_path, "[metrics]\nenable_tensorboard = false\nsave_tb_folder = 'elsewhere'\n")
    assert quiet.missing == []
    loud = translated(tmp_path, "[metrics]\nenable_tensorboard = true\n[fault_tolerance]\nenable = true\n")
    assert [remark.option for remark in loud.missing] == ["metrics.enable_tensorboard", "fault_tolerance.enable"]


def test_what_a_file_leaves_out_is_torchtitans_default(tmp_path: Path) -> None:
    """An empty file recomputes every second block, saves nothing and warms up for 200 steps, as TorchTitan does."""
    config = translated(tmp_path, "").config
    assert config is not None
    assert (config.activation_checkpoint.mode.name, config.activation_checkpoint.every) == ("every_nth", 2)
    assert config.checkpoint.mode.name == "disabled"
    assert (config.lr_scheduler.warmup_steps, config.lr_scheduler.decay_ratio) == (200, None)
    assert config.training.steps == 10000


def test_names_of_earlier_versions_are_understood(tmp_path: Path) -> None:
    """A file of 2025 says the same as one of today, and what was renamed is told."""
    old, renamed = read_toml(
        write(
            tmp_path,
            "[training]\nbatch_size = 2\ncompile = true\nseed = 5\n[model]\nconverters = 'float8'\n"
            "[float8]\nfilter_fqns = 'output'\n[checkpoint]\nenable_checkpoint = false\n",
        )
    )
    new, unchanged = read_toml(
        write(
            tmp_path,
            "training = {local_batch_size = 2}\ncompile = {enable = true}\ndebug = {seed = 5}\n"
            "model = {converters = ['float8']}\nquantize = {linear = {float8 = {filter_fqns = ['output']}}}\n"
            "checkpoint = {enable = false}",
        )
    )
    assert old == new
    assert "training.batch_size is training.local_batch_size" in renamed
    assert unchanged == []


def test_text_with_spaces_and_quotes_survives_the_shell_and_hydra(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is printed can be pasted: the shell and Hydra read the words that stood in the file."""
    folder = "my runs/it's, [a] {b} = $HOME"
    path = write(tmp_path, f'[job]\ndump_folder = "{folder}"\n[training]\nsteps = 300\n')
    with pytest.raises(SystemExit) as exit:
        main(["toml", str(path)])
    assert exit.value.code == 0
    command = capsys.readouterr().out.partition("\n\n")[0]
    typed = shlex.split(command.replace("\\\n", " "))
    assert typed[:3] == ["python", "-m", "titan.train"]
    assert compose(typed[3:]).run.dir == folder


def test_held_out_rows_are_counted_over_all_ranks(tmp_path: Path) -> None:
    """TorchTitan counts steps of validation, each of a batch on every data-parallel rank."""
    text = (
        "model = {flavor = '8B'}\nparallelism = {tensor_parallel_degree = 2}\n"
        "validation = {enable = true, steps = 10, local_batch_size = 4}"
    )
    config = translated(tmp_path, text, 16).config
    assert config is not None
    assert config.validation.rows == 10 * 4 * 8


def test_weights_of_a_hugging_face_folder_are_started_from(tmp_path: Path) -> None:
    """The folder is taken over; where it is not on this machine, that is said."""
    text = (
        "[checkpoint]\nenable = true\ninitial_load_in_hf = true\ninitial_load_path = '/weights/8B'\n"
        "exclude_from_loading = ['lr_scheduler', 'output']\nasync_mode = 'async'\n[training]\ndataset_path = '/c4'\n"
    )
    translation = translated(tmp_path, text)
    config = translation.config
    assert config is not None
    assert config.checkpoint.initial_load == "/weights/8B"
    assert config.checkpoint.exclude == ["model.output*"]
    assert config.checkpoint.last_content.name == "weights"
    assert "checkpoint.initial_load = /weights/8B" in translation.absent


def test_what_titan_refuses_is_said_after_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A layout that titan does not have ends with titan's own problem and exit code 2, with the command to change."""
    path = write(tmp_path, "[model]\nflavor = '8B'\n[parallelism]\ntensor_parallel_degree = 3\n")
    with pytest.raises(SystemExit) as exit:
        main(["toml", str(path)])
    out, err = capsys.readouterr()
    assert exit.value.code == 2
    assert "parallelism.tp=3" in out
    assert "refused for 3 ranks" in out
    assert "parallelism.tp = 3 does not divide model.n_kv_heads = 8" in err


MISTAKES = {
    "no TOML": ("[job\nname = 1", ["is not TOML", "line 1"]),
    "an unknown option": ("[training]\nseqlen = 1\n", ["training.seqlen is not an option", "training.seq_len"]),
    "an unknown section": ("[trainnig]\nsteps = 1\n", ["trainnig.steps is not an option", "training.steps"]),
    "another type": ("[training]\nsteps = 'many'\n", ['training.steps = "many" is not a whole number']),
    "a number for a switch": ("[compile]\nenable = 1\n", ["compile.enable = 1 is not true or false"]),
    "a switch for a number": ("[training]\nsteps = true\n", ["training.steps = true is not a whole number"]),
    "another model": ("[model]\nname = 'deepseek_v3'\n", ["model.name", "titan trains Llama"]),
    "another size": ("[model]\nflavor = '7B'\n", ["model.flavor", "debugmodel, 8B, 70B, 405B"]),
    "two names of one": (
        "[training]\nbatch_size = 1\nlocal_batch_size = 2\n",
        ["training.batch_size and training.local_batch_size are the same"],
    ),
    "all at once": ("[a]\nb = 1\n[training]\nsteps = []\n", ["2 problems", "a.b", "training.steps = []"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_torchtitan_would_not_read_is_refused_by_name(mistake: str, tmp_path: Path) -> None:
    """Nothing is guessed: every mistake of a file is named, and nothing is printed to paste."""
    text, expected = MISTAKES[mistake]
    with pytest.raises(CommandError) as error:
        translated(tmp_path, text)
    assert error.value.exit_code == 2
    for words in expected:
        assert words in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """A missing file, a folder and a binary file are the user's mistakes."""
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    for name, reason in (("none.toml", "No such file"), (".", "Is a directory"), ("binary.toml", "not UTF-8")):
        with pytest.raises(CommandError, match=reason):
            translate(tmp_path / name)


def test_it_is_a_command_of_the_front_end(tmp_path: Path, cache: Path) -> None:
    """No torch is imported to translate a file."""
    path = write(tmp_path, "")
    code = (
        "import sys; from titan.convert.toml import translate; from pathlib import Path; "
        f"translate(Path({str(path)!r})); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], env=clean_environment(cache), timeout=60).returncode == 0
