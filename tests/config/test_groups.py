"""What is in conf/: every option composes to the schema's types, and every recipe keeps every rule."""

from __future__ import annotations

import re

import pytest
import yaml

from titan.config.check import check_config
from titan.config.degrees import AXES, Machine, choose_attention, resolve_config, world_size
from titan.config.keys import schema_keys
from titan.config.load import Composer, compose, conf_dir, config_text, option_groups, parse_config, to_typed
from titan.config.schema import Attention, Dtype
from titan.errors import ConfigError

OPTIONS = [
    (group, option)
    for group, options in option_groups().items()
    if group.partition("/")[0] != "hydra"
    for option in options
]
EXPERIMENTS = [option for group, option in OPTIONS if group == "experiment"]
LEFT_OPEN = {("data", "text"): ["data.path=/text"], ("data", "jsonl"): ["data.path=/lines"]}
"""What an option cannot know and asks for."""


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=["=".join(pair) for pair in OPTIONS])
def test_every_option_composes(group: str, option: str) -> None:
    """No file of conf/ can rot: each makes a config of the schema's types that survives being frozen and read."""
    config = compose([f"{group}={option}", *LEFT_OPEN.get((group, option), [])])
    assert parse_config(config_text(config), "here") == config


def test_every_file_can_be_chosen() -> None:
    """Each file of conf/ but the list of groups is an option that the tests above have composed."""
    files = {path.relative_to(conf_dir()).with_suffix("").as_posix() for path in conf_dir().rglob("*.yaml")}
    assert files - {"train"} == {f"{group}/{option}" for group, option in OPTIONS}


def test_the_list_of_groups_names_every_group() -> None:
    """conf/train.yaml is the table of contents: every group is in its defaults, with an option that is there."""
    defaults = yaml.safe_load((conf_dir() / "train.yaml").read_text())["defaults"]
    listed = {key: value for item in defaults if isinstance(item, dict) for key, value in item.items()}
    for group in {group for group, _ in OPTIONS} - {"experiment"}:
        assert (group, listed[group]) in OPTIONS
    assert listed["experiment"] is None


def test_every_node_of_the_schema_is_a_group_or_set_by_the_list_of_groups() -> None:
    """There is no part of the config that a user could not find in conf/."""
    nodes = {name for name, key in schema_keys().items() if key.is_node and "." not in name}
    assert nodes == {group for group, _ in OPTIONS} - {"experiment"} | {"run"}


def outer_launcher(gpus: int) -> Machine:
    """Return a machine of a cluster on which an outer launcher has started one rank a GPU, eight a machine."""
    return Machine(gpus=8, started_ranks=gpus, started_ranks_per_node=8)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_keeps_every_rule_on_the_machines_it_is_for(name: str) -> None:
    """A recipe that says how many GPUs it is for fits them, and says in words what it is expected to give."""
    gpus = re.search(r"_(\d+)gpu$", name)
    machine = outer_launcher(int(gpus.group(1))) if gpus else Machine()
    config = check_config(compose([f"experiment={name}"]), machine)
    assert config.run.name == name
    if gpus:
        assert world_size(config.cluster) == int(gpus.group(1))
    assert "\n# Expected: " in (conf_dir() / "experiment" / f"{name}.yaml").read_text()


@pytest.mark.parametrize(
    ("name", "degrees", "rows", "recompute"),
    [
        ("llama3_8b_8gpu", (1, 1, 8, 1, 1), 2 * 8, "selective"),
        ("llama3_70b_256gpu", (1, 1, 32, 1, 8), 16 * 32, "full"),
        ("llama3_405b_512gpu", (8, 1, 8, 1, 8), 32 * 8, "full"),
    ],
)
def test_published_recipes_are_as_they_were_published(
    name: str, degrees: tuple[int, ...], rows: int, recompute: str
) -> None:
    """The degrees, batch and recomputation of a published set-up are those of its publication.

    Source:
        TorchTitan, https://arxiv.org/abs/2410.06511, its tables of Llama 3.1 8B, 70B and 405B.
    """
    config = check_config(compose([f"experiment={name}"]), outer_launcher(int(name.split("_")[-1].removesuffix("gpu"))))
    assert tuple(getattr(config.parallelism, axis) for axis in AXES) == degrees
    assert config.training.global_batch_size == rows
    assert config.training.seq_len == 8192
    assert config.activation_checkpoint.mode.name == recompute


def test_the_command_line_has_the_last_word() -> None:
    """Groups and keys that are typed win over an experiment, which wins over the defaults."""
    config = compose(["experiment=llama3_8b_8gpu", "lr_scheduler=cosine", "training.steps=7"])
    assert config.model.name == "llama3_1_8b"
    assert config.lr_scheduler.decay_type.name == "cosine"
    assert config.training.steps == 7
    assert config.training.seq_len == 8192


def test_points_of_a_sweep_are_composed_as_by_themselves() -> None:
    """Sharing one composition among points changes no key of any: values, options, recipes and tables alike."""
    points = [
        ["training.seed=1", "optimizer.lr=0.1"],
        ["training.seed=2", "optimizer.lr=0.2"],
        ["training.seed=2", "model=llama3_8b", "model.n_layers=4"],
        ["model.rope_scaling=null", "model=llama3_8b", "run.name=${model.name}-x"],
        ["experiment=llama3_8b_8gpu", "training.steps=7"],
        ["training.steps=7", "training.steps=8", "training.steps=7"],
        ["training.steps=7", "experiment=llama3_8b_8gpu", "training={seq_len:64}"],
        ["+cluster.environment.A=1", "+cluster.sbatch={nice:3}", "cluster.setup=[a,b]"],
        ["cluster=slurm", "cluster.nodes=2", "parallelism.pp_modules=[[tok_embeddings],[norm,output]]"],
    ]
    points = [
        [*point, "run.dir=runs/${run.name}"] for point in [*points, points[0]]
    ]  # else it would have the time in it
    assert [to_typed(each) for each in map(Composer(), points)] == [compose(point) for point in points]


@pytest.mark.parametrize(
    ("overrides", "machine", "expected"),
    [
        ([], Machine(), Dtype.float32),
        ([], Machine(has_bfloat16=True), Dtype.bfloat16),
        ([], Machine(gpus=1), Dtype.bfloat16),
        (["cluster.device=cpu"], Machine(gpus=1), Dtype.float32),
        (["training.param_dtype=float32"], Machine(has_bfloat16=True), Dtype.float32),
        (["training.param_dtype=bfloat16"], Machine(), Dtype.bfloat16),
    ],
)
def test_the_format_follows_the_device(overrides: list[str], machine: Machine, expected: Dtype) -> None:
    """Bfloat16 where there are units for it, unless the user says something else."""
    config = compose(["data=python_stdlib", "run.dir=unused", *overrides])
    assert check_config(config, machine).training.param_dtype is expected


BFLOAT16 = "training.param_dtype=bfloat16"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], Attention.default),
        (["compile=inductor"], Attention.cpu),
        (["compile=inductor", "data.mask_documents=true"], Attention.cpu),
        (["compile=inductor", "training.attention=flash"], Attention.flash),
        (["training.attention=cpu"], Attention.cpu),
        (["compile=inductor", "compile.backend=aot_eager"], Attention.default),
        (["compile=inductor", "model.n_heads=128", "model.n_kv_heads=128"], Attention.default),
        (["compile=inductor", "parallelism.cp=2", "parallelism.cp_method=ring"], Attention.default),
        (["compile=inductor", "parallelism.cp=2", "parallelism.cp_method=all_to_all"], Attention.cpu),
        (["compile=inductor", "cluster=simulated"], Attention.default),
        (["compile=inductor", "model.n_heads=2", "model.n_kv_heads=2"], Attention.cpu),
        (["compile=inductor", "model.n_heads=2", "model.n_kv_heads=2", BFLOAT16], Attention.cpu),
        (["compile=inductor", "model.dim=288", "model.n_heads=4", "model.n_kv_heads=4"], Attention.cpu),
        (["compile=inductor", "model.dim=288", "model.n_heads=4", "model.n_kv_heads=4", BFLOAT16], Attention.default),
        (["compile=inductor", BFLOAT16], Attention.cpu),
    ],
)
def test_what_is_compiled_for_a_cpu_takes_titans_own_attention(overrides: list[str], expected: Attention) -> None:
    """Unless another is asked for, or is faster (for large heads that fill no tiles), or it cannot: a ring, a GPU."""
    config, _ = resolve_config(compose(["run.dir=unused", "data=python_stdlib", *overrides]), Machine())
    assert choose_attention(config) is expected


def test_without_a_compiler_titans_own_attention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything starts, with what to type instead."""
    monkeypatch.setenv("PATH", "")
    config = compose(["run.dir=unused", "data=python_stdlib", "training.attention=cpu"])
    with pytest.raises(ConfigError) as error:
        check_config(config, Machine())
    (problem,) = error.value.problems
    assert "no C++ compiler (g++)" in problem.what
    assert problem.suggestion == "training.attention=default"


def test_a_frozen_config_refers_to_nothing() -> None:
    """Not even where a value was escaped: whoever reads the file later has another environment."""
    text = config_text(compose([r"run.name='\${model.name}'", "run.dir=x"]))
    assert "${" not in text
    assert parse_config(text, "it").run.name == "llama3_debug"
