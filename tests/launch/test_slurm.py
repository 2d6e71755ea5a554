"""What is asked of SLURM, as far as it can be seen without one. What SLURM makes of it: tests/slurm."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.conftest import Command
from tests.data.vocabulary import write_json_tokenizer
from tests.support.command import FAULT, REPOSITORY, TINY
from tests.support.configs import compose
from titan.config.check import check_config
from titan.config.degrees import Machine
from titan.config.schema import TitanConfig
from titan.errors import ConfigError
from titan.launch.environment import adopt_slurm_step, current_rank, expand_counts, first_host, slurm_gpus
from titan.launch.slurm import AFTER_RANKS, BEFORE_RANKS, batch_script, batches, submit
from titan.run_directory import RunDirectory

BY_HAND = REPOSITORY / "launchers" / "slurm" / "titan.sbatch"
SLURM = ("cluster=slurm", "cluster.devices_per_node=8", "cluster.nodes=2", "run.dir=/runs/one")


def checked(*overrides: str) -> TitanConfig:
    """Return a config as the command line would have it on a login node."""
    return check_config(compose([*SLURM, *overrides]), Machine())


def script(*overrides: str) -> str:
    """Return the batch script of a run."""
    return script_of([checked(*overrides)])


def script_of(configs: list[TitanConfig], sweep: Path | None = None) -> str:
    """Return the batch script of some runs that share one."""
    (batch,) = batches([(config, RunDirectory(Path(config.run.dir))) for config in configs], sweep)
    return batch_script(batch, configs[0].cluster)


def flags(text: str) -> set[str]:
    """Return what a batch script asks of sbatch."""
    return {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")}


def srun(text: str) -> str:
    """Return the line that starts the ranks."""
    (line,) = (line for line in text.splitlines() if line.startswith("srun "))
    return line


def test_every_setting_is_asked_for() -> None:
    """Each key of the cluster becomes the argument that sbatch or srun knows it by, and nothing else is asked for."""
    text = script(
        *("cluster.partition=gpu", "cluster.account=lab", "cluster.qos=high", "cluster.reservation=week"),
        *("cluster.constraint=h100", "cluster.time=1-12", "cluster.exclusive=true", "cluster.cpus_per_task=12"),
        *("cluster.memory=0", "cluster.grace_seconds=300", "cluster.setup=['module load cuda','ulimit -l unlimited']"),
        *("+cluster.sbatch.mail-type=END", "+cluster.sbatch.contiguous=''", "+cluster.srun.cpu-bind=cores"),
        "cluster.python=/opt/my python",
    )
    assert flags(text) == {
        *("--job-name=llama3_debug", "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--partition=gpu"),
        *("--account=lab", "--qos=high", "--reservation=week", "--constraint=h100", "--time=1-12", "--exclusive"),
        *("--cpus-per-task=12", "--mem=0", "--signal=USR2@300", "--requeue", "--open-mode=append", "--mail-type=END"),
        *("--contiguous", "--output=/runs/one/slurm/%j_0_log.out"),
    }
    assert text.index("module load cuda") < text.index("ulimit -l") < text.index("srun --")
    for argument in ("--kill-on-bad-exit=1", "--cpus-per-task=12", "--cpu-bind=cores", "'/opt/my python' -u"):
        assert argument in srun(text)


def test_what_is_not_set_is_left_to_the_site() -> None:
    """Without a setting no argument: the site's defaults, and the user's SBATCH_ variables, hold."""
    assert flags(script()) == {
        *("--job-name=llama3_debug", "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--signal=USR2@120"),
        *("--requeue", "--open-mode=append", "--output=/runs/one/slurm/%j_0_log.out"),
    }


def test_a_container_has_the_run_and_the_cache_in_it() -> None:
    """The ranks run in an image that sees their own folder, the cache, and what else is mounted."""
    line = srun(script("cluster.container_image='nvcr.io#nvidia/pytorch:26.05-py3'", "cluster.python=python3",
                       "cluster.container_mounts=['/data:/data']", "data.cache_dir=/cache"))  # fmt: skip
    assert "'--container-image=nvcr.io#nvidia/pytorch:26.05-py3'" in line
    assert "--container-mounts=/runs/one:/runs/one,/cache:/cache,/data:/data" in line
    assert line.endswith("python3 -u -m submitit.core._submit /runs/one/slurm")


@pytest.mark.parametrize("argument", ["gres='gpu:h100:8'", "gpus-per-task=1", "gpus=16"])
def test_gpus_asked_for_in_the_sites_own_way_are_not_asked_for_twice(argument: str) -> None:
    """A site that wants --gres or --gpus gets that, and no --gpus-per-node beside it."""
    asked = flags(script(f"+cluster.sbatch.{argument}"))
    assert not any(flag.startswith("--gpus-per-node") for flag in asked)
    assert any(flag.startswith(f"--{argument.partition('=')[0]}=") for flag in asked)


def test_a_cpu_cluster_is_asked_for_no_gpu() -> None:
    """cluster.device=cpu asks for tasks alone, one a node unless told otherwise."""
    config = check_config(compose(["cluster=slurm", "cluster.nodes=2", "cluster.device=cpu"]), Machine())
    assert config.cluster.devices_per_node == 1
    assert not any("gpu" in flag for flag in flags(script_of([config])))


@pytest.mark.parametrize("points", [1, 3])
def test_the_script_is_one_that_bash_reads(points: int, tmp_path: Path) -> None:
    """Whatever is in the settings, the script has no syntax error."""
    config = checked("cluster.setup=['echo \"a b\" | cat']", 'cluster.python="/opt/a b/python"')
    path = tmp_path / "script.sh"
    path.write_text(script_of([config] * points, tmp_path / "a folder"))
    assert subprocess.run(["bash", "-n", path], capture_output=True, check=False).returncode == 0
    assert (f"--array=0-{points - 1}%{points}" in path.read_text()) == (points > 1)


STAND_INS = {
    "squeue": 'echo "squeue $@" >> calls; if [ "$STATE" = silent ]; then exit 1; fi; echo "$STATE"',
    "scontrol": 'echo "scontrol $@" >> calls; test "$STATE" != refused',
    "srun": "exit $CODE",
    "sleep": "exit 0",
}


def run_script(folder: Path, text: str, programs: dict[str, str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a batch script of job 12 among stand-ins for SLURM's programs."""
    for name, program in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{program}\n")
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_ID": "12", "SQUEUE_STATES": "PENDING", **variables}
    command = ["bash", "-u", "-c", text, "script", "run.dir=x"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("code", "state", "restarts", "array", "requeued"),
    [
        (0, "RUNNING", "", False, None),
        (1, "RUNNING", "", False, None),
        (143, "RUNNING", "", False, None),
        (75, "RUNNING", "", False, "12"),
        (140, "RUNNING", "", False, "12"),  # told to stop before it could listen
        (75, "RUNNING", "4", False, "12"),
        (75, "RUNNING", "5", False, None),
        (75, "CANCELLED", "", False, None),
        (75, "COMPLETING", "", False, None),
        (75, "silent", "", False, "12"),  # SLURM does not answer
        (75, "RUNNING", "", True, "10_2"),
    ],
)
@pytest.mark.parametrize("by_hand", [False, True], ids=["submitted", "by hand"])
def test_a_job_comes_back_only_if_its_ranks_ask_for_it(
    tmp_path: Path, code: int, state: str, restarts: str, array: bool, requeued: str | None, by_hand: bool
) -> None:
    """After a stop in order, at most so often, not when cancelled; of an array, the one point. The exit code stays."""
    variables = {"CODE": str(code), "STATE": state, "MAX_REQUEUES": "5"}
    if restarts:
        variables["SLURM_RESTART_COUNT"] = restarts
    if array:
        variables |= {"SLURM_ARRAY_JOB_ID": "10", "SLURM_ARRAY_TASK_ID": "2"}
    text = BY_HAND.read_text() if by_hand else script("cluster.max_requeues=5")
    done = run_script(tmp_path, text, STAND_INS, **variables)
    assert done.returncode == code, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    assert [line for line in calls if line.startswith("scontrol")] == (
        [f"scontrol requeue {requeued}"] * (requeued is not None)
    )
    assert ("goes back into the queue" in done.stdout) == (requeued is not None)
    assert ("and does not come back" in done.stdout) == (state in ("CANCELLED", "COMPLETING"))
    assert ("the same command goes on" in done.stdout) == (restarts == "5")


@pytest.mark.parametrize("ends", ["requeue", "sleep"])
def test_a_job_that_slurm_ends_at_once_has_said_so(tmp_path: Path, ends: str) -> None:
    """SLURM ends the script of a job that it puts back, whether scontrol has returned by then or not."""
    end = "kill -KILL $PPID"
    programs = STAND_INS | {"sleep": end} | ({"scontrol": end} if ends == "requeue" else {})
    done = run_script(tmp_path, script(), programs, CODE="75", STATE="RUNNING")
    assert done.returncode == -signal.SIGKILL
    assert "titan: job 12 goes back into the queue, restart 1 of at most 50\n" in done.stdout


def test_a_job_that_slurm_does_not_put_back_says_what_goes_on(tmp_path: Path) -> None:
    """It is asked five times; then the job ends with its ranks' code."""
    done = run_script(tmp_path, script(), STAND_INS, CODE="75", STATE="refused")
    assert done.returncode == 75
    assert (tmp_path / "calls").read_text().count("scontrol requeue 12\n") == 5
    assert done.stdout.endswith("titan: SLURM does not put job 12 back; the same command goes on\n")


def test_the_batch_file_by_hand_has_the_same_lines() -> None:
    """What launchers/slurm/titan.sbatch does before and after the ranks is what a submitted script does."""
    text = BY_HAND.read_text()
    assert f"\n{BEFORE_RANKS}\n" in text
    assert text.endswith(f"\n{AFTER_RANKS}\n")


def test_the_batch_file_by_hand_wants_a_run_directory(tmp_path: Path) -> None:
    """Without run.dir a job that comes back would be another run; nothing is started."""
    (tmp_path / "srun").write_text("#!/bin/bash\necho started\n")
    (tmp_path / "srun").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "1"}
    done = subprocess.run(["bash", BY_HAND, "model=x"], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "run.dir=" in done.stderr


def test_a_failing_set_up_ends_the_job(tmp_path: Path) -> None:
    """The ranks are not started where a set-up command fails."""
    text = script("cluster.setup=['false']").replace("srun ", "echo started; ")
    done = subprocess.run(["bash", "-c", text], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "started" not in done.stdout


def test_points_that_ask_the_same_share_an_array() -> None:
    """Grouped by what is asked of SLURM and not by what is trained, each group in the order of its points."""
    image = ("cluster.container_image=image", "cluster.python=python3")
    for more in ((), image):
        points = [
            checked(f"training.seed={seed}", f"cluster.nodes={nodes}", f"run.dir=/sweep/{seed}{nodes}", *more)
            for nodes in (1, 2)
            for seed in (1, 2)
        ]
        sweep = [(config, RunDirectory(Path(config.run.dir))) for config in points]
        found = batches(sweep, Path("/sweep"))
        assert [batch.points for batch in found] == [[0, 1], [2, 3]]
        assert {batch.folder for batch in found} == {Path("/sweep/slurm")}
        mixed = batches([sweep[0], sweep[2], sweep[1]], Path("/sweep"))
        assert [(batch.points, batch.folder) for batch in mixed] == [
            ([0, 2], Path("/sweep/slurm")),
            ([1], Path("/sweep/12/slurm")),
        ]
        assert [batch.points for batch in batches(sweep)] == [[0], [1], [2], [3]]
    assert "/sweep:/sweep" in srun(script_of(points[:2], Path("/sweep"))), "all points, and the pickles"


SHELL = {
    "SBATCH_PARTITION": "debug",
    "SBATCH_ACCOUNT": "mine",
    "SBATCH_SIGNAL": "TERM@5",
    "SBATCH_NO_REQUEUE": "1",
    "SBATCH_EXPORT": "NONE",
    "SBATCH_NICE": "5",
    "MASTER_ADDR": "localhost",
    "WORLD_SIZE": "1",
    "SLURM_CONF": "/etc/slurm/slurm.conf",
    "HF_TOKEN": "secret",
}


@pytest.mark.parametrize("inside", [False, True])
def test_the_shell_does_not_override_what_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, inside: bool
) -> None:
    """Sbatch puts its variables above its script: those that contradict the config are hidden, the others hold."""
    for name in ("sbatch", "srun"):
        (tmp_path / name).write_text(f"#!/bin/bash\nenv > {tmp_path}/seen\necho Submitted batch job 7\n")
        (tmp_path / name).chmod(0o755)
    for name, value in {**SHELL, **({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "9"} if inside else {})}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    directory = RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    config = checked("cluster.partition=gpu", f"run.dir={directory.path}", "+cluster.sbatch.nice=1")
    (job,) = submit([(config, directory)])
    assert job.id == "7"
    assert directory.read_events("submit")[0]["job"] == "7"
    seen = dict(line.partition("=")[::2] for line in (tmp_path / "seen").read_text().splitlines())
    hidden = {"SBATCH_PARTITION", "SBATCH_SIGNAL", "SBATCH_NO_REQUEUE", "SBATCH_EXPORT", "SBATCH_NICE"}
    hidden |= {"MASTER_ADDR", "WORLD_SIZE", "SLURM_JOB_ID", "SLURM_NTASKS"}
    assert hidden & set(seen) == set()
    assert {name: seen[name] for name in ("SBATCH_ACCOUNT", "SLURM_CONF", "HF_TOKEN")} == {
        name: SHELL[name] for name in ("SBATCH_ACCOUNT", "SLURM_CONF", "HF_TOKEN")
    }
    assert os.environ["SBATCH_PARTITION"] == "debug", "the user's shell is as it was"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node[1-4]", "node1"),
        ("node[07-12,15]", "node07"),
        ("rack[3-5,9]-n[01-16],login", "rack3-n01"),
        ("a[1,3].example.org,b", "a1.example.org"),
        ("gpu-b200-[001-002]", "gpu-b200-001"),
        ("x,node[1-4]", "x"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    """SLURM's lists of hosts, as `scontrol show hostnames` reads them."""
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("text", "counts"), [("1", [1]), ("8(x2)", [8, 8]), ("3,1", [3, 1]), ("2(x3),1,4(x2)", [2, 2, 2, 1, 4, 4])]
)
def test_counts_of_nodes(text: str, counts: list[int]) -> None:
    """SLURM's counts, one for each node."""
    assert expand_counts(text) == counts


STEP = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "node[3-5]",
    "SLURM_PROCID": "4",
    "SLURM_NODEID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_RESTART_COUNT": "2",
}


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of the last task of a step of five."""
    with monkeypatch.context() as patch:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            patch.setenv(name, "")  # so that what is set is taken away again
            patch.delenv(name)
        for name, value in STEP.items():
            patch.setenv(name, value)
        yield patch  # type: ignore[misc]


def test_a_task_of_a_step_is_a_rank(step: pytest.MonkeyPatch) -> None:
    """A task of several is described as torchrun would, and meets the others at the first node's."""
    adopt_slurm_step()
    rank = current_rank()
    assert rank is not None
    assert (rank.rank, rank.local_rank, rank.world_size, rank.local_world_size, rank.attempt) == (4, 0, 5, 1, 2)
    assert os.environ["MASTER_ADDR"] == "node3"
    assert 1024 < int(os.environ["MASTER_PORT"]) < 32768, "not where Linux puts outgoing connections"


def test_torchrun_inside_a_step_wins(step: pytest.MonkeyPatch) -> None:
    """Ranks of a torchrun that srun has started are torchrun's."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "here", "MASTER_PORT": "7"}.items():
        step.setenv(name, value)
    adopt_slurm_step()
    rank = current_rank()
    assert rank is not None
    assert (rank.rank, rank.world_size) == (0, 1)


def test_a_shell_in_a_step_is_no_rank(step: pytest.MonkeyPatch) -> None:
    """The only task of a step may be a shell, in which titan is a command; a job's own task is a rank all the same."""
    for name, value in {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_TASKS_PER_NODE": "1"}.items():
        step.setenv(name, value)
    adopt_slurm_step()
    assert current_rank() is None
    adopt_slurm_step(is_rank=True)
    rank = current_rank()
    assert rank is not None
    assert (rank.rank, rank.world_size, rank.attempt) == (0, 1, 2)


@pytest.mark.parametrize(
    ("listed", "partition", "gpus"),
    [
        ("gpu:4 main*\ngpu:4 main*\ngpu:2 small\n", None, 4),
        ("gpu:h100:8(S:0-1) gpu\ngpu:h100:8(S:0-1) gpu\n", "gpu", 8),
        ("gpu:a100:4(S:0),gpu:a100:4(S:1),nic:2 gpu\n", "gpu", 8),
        ("gpu:4 main*\ngpu:8 main*\n", None, None),
        ("(null) cpu\n", "cpu", None),
        ("", "nosuch", None),
    ],
)
def test_the_gpus_of_a_partitions_nodes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, listed: str, partition: str | None, gpus: int | None
) -> None:
    """What sinfo prints is read as a number only where all nodes have the same."""
    sinfo = tmp_path / "sinfo"
    sinfo.write_text(f"#!/bin/bash\nprintf '%s' '{listed}'\n")
    sinfo.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    slurm_gpus.cache_clear()
    assert (slurm_gpus(partition) or None) == gpus
    slurm_gpus.cache_clear()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["cluster.time=90"], ["cluster.time = 90", "cluster.time=1:30:00"]),
        (["cluster.time=1:30"], ["cluster.time = 1:30 is not a time"]),
        (["cluster.time=0:01:00"], ["leaves no time to train: cluster.grace_seconds = 120"]),
        (["cluster.memory=lots"], ["cluster.memory = lots", "cluster.memory=500G"]),
        (["+cluster.sbatch.partition=x"], ["titan sets --partition itself", "cluster.partition=..."]),
        (["+cluster.srun.ntasks=4"], ["titan sets --ntasks itself", "leave cluster.srun.ntasks out"]),
        (["+cluster.environment.WANDB_API_KEY=x"], ["looks like a secret", "export WANDB_API_KEY"]),
        (["+cluster.environment.HF_TOKEN=x"], ["looks like a secret"]),
        (["+cluster.environment.AWS_ACCESS_KEY_ID=x"], ["looks like a secret"]),
        (["cluster.setup=['export HF_TOKEN=x']"], ["cluster.setup sets HF_TOKEN, which looks like a secret"]),
        (["+cluster.sbatch.job-name=x"], ["titan sets --job-name itself", "run.name=..."]),
        (["cluster.container_mounts=[/a]"], ["no container to mount into"]),
        (["cluster.container_image=x"], ["not which Python is in it", "cluster.python=python3"]),
        (["run.dir=runs/100%j"], ["has a %, which SLURM would replace"]),
        (["cluster.max_requeues=-1"], ["cluster.max_requeues = -1 is below 0"]),
        (["cluster=local", "cluster.nodes=1", "cluster.partition=gpu"], ["cluster.partition=gpu, but cluster=local"]),
        (["cluster=local", "cluster.nodes=1", "cluster.wait=true"], ["cluster.wait=true, but cluster=local"]),
    ],
)
def test_what_slurm_would_not_understand_is_refused(overrides: list[str], said: list[str]) -> None:
    """A mistake about SLURM is found where nothing is submitted, and says what to type instead."""
    with pytest.raises(ConfigError) as error:
        checked(*overrides)
    for text in said:
        assert text in str(error.value)


def test_a_variable_that_only_sounds_like_a_secret_is_let_through() -> None:
    """TOKENIZERS_PARALLELISM is no token."""
    assert "export TOKENIZERS_PARALLELISM=false" in script("+cluster.environment.TOKENIZERS_PARALLELISM='false'")


@pytest.mark.parametrize("time", ["1:30:00", "100:00:00", "2-00", "2-12:30", "1-00:00:00"])
def test_times_that_slurm_reads(time: str) -> None:
    """What has one meaning only is handed on as it is."""
    assert f"--time={time}" in flags(script(f"cluster.time={time}"))


def test_an_unknown_number_of_gpus_is_asked_for() -> None:
    """Where SLURM does not say how many GPUs a node has, the user has to."""
    with pytest.raises(ConfigError, match=r"cluster\.devices_per_node=8"):
        check_config(compose(["cluster=slurm"]), Machine())
    config = check_config(compose(["cluster=slurm"]), Machine(slurm_gpus={None: 6}.get))
    assert config.cluster.devices_per_node == 6


def test_without_slurm_it_says_so_and_writes_nothing(titan: Command, here: Path) -> None:
    """On a laptop the script can be seen, and a submission is refused."""
    shown = titan(*SLURM[:-1], "run.dir=run", "cluster.print_script=true", PATH="/usr/bin:/bin")
    assert shown.code == 0
    assert shown.out.startswith("#!/bin/bash")
    assert str(here / "run" / "slurm") in shown.out
    refused = titan(*SLURM[:-1], "run.dir=run", PATH=str(here))
    assert refused.code == 2
    assert "there is no sbatch and no srun here" in refused.err
    assert list(here.iterdir()) == []


def test_variables_reach_ranks_on_this_machine_too(titan_process: Command, text_file: Path, here: Path) -> None:
    """cluster.environment is for every way to start ranks."""
    finished = titan_process(
        *(*TINY, f"data.path={text_file}", "run.dir=run", "+cluster.environment.SHOWN=told"),
        PYTHONPATH=str(FAULT),
        PLANTED_FAULT="environment:SHOWN:1",
    )
    assert finished.code == 0, finished.text
    assert "SHOWN 4" in finished.out


def test_an_entry_of_a_table_needs_a_plus(titan: Command) -> None:
    """Hydra adds nothing without a +; the message has the override to paste."""
    finished = titan("cluster=slurm", "cluster.environment.NCCL_DEBUG=INFO", "cluster.devices_per_node=1")
    assert finished.code == 2
    assert "1 problem" in finished.err
    assert "Try  +cluster.environment.NCCL_DEBUG=INFO" in finished.err


def test_a_container_sees_what_lies_beside_a_tokenizer_json(tmp_path: Path) -> None:
    """The settings beside it say which tokens begin and end a text, so its folder is mounted and not the file alone."""
    path = write_json_tokenizer(tmp_path / "folder") / "tokenizer.json"
    chosen = ("cluster.container_image=image", "cluster.python=python3", "tokenizer=huggingface")
    mounts = srun(script(*chosen, f"tokenizer.path={path}"))
    assert f"{path.parent}:{path.parent}" in mounts
    assert f"{path}:{path}" not in mounts
