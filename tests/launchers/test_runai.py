"""launchers/kubernetes/runai.sh, against the flags that Run:ai publishes."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from .files import KUBERNETES

SCRIPT = KUBERNETES / "runai.sh"

# The reference of "runai training pytorch submit", as it was published with the first versions of this command line:
#   https://github.com/run-ai/docs, docs/Researcher/cli-reference/new-cli/runai_training_pytorch_submit.md
# Today it is at https://docs.nvidia.com/run-ai/self-hosted/reference/cli/runai/training/runai-training-pytorch-submit
PYTORCH_SUBMIT = """
    --allow-privilege-escalation --annotation --attach --auto-deletion-time-after-completion --backoff-limit
    --capability --command --configmap-map-volume --cpu-core-limit --cpu-core-request --cpu-memory-limit
    --cpu-memory-request --create-home-dir --environment --existing-pvc --extended-resource --external-url --git-sync
    --gpu-devices-request --gpu-memory-limit --gpu-memory-request --gpu-portion-limit --gpu-portion-request
    --gpu-request-type --help --host-ipc --host-network --host-path --image --image-pull-policy --label --large-shm
    --master-args --master-environment --master-extended-resource --master-gpu-devices-request
    --master-gpu-portion-limit --master-gpu-portion-request --master-no-pvcs --max-replicas --mig-profile
    --min-replicas --name-prefix --new-pvc --nfs --no-master --node-pools --node-type --pod-running-timeout --port
    --preferred-pod-topology-key --project --required-pod-topology-key --run-as-gid --run-as-uid --run-as-user --s3
    --seccomp-profile --stdin --supplemental-groups --toleration --tty --user-group-source --wait-for-submit --workers
    --working-dir
"""
# What later versions added to "runai training ... submit", from the reference of another framework's:
#   https://run-ai-docs.nvidia.com/self-hosted/reference/cli/runai/runai_xgboost_submit.md
# --environment has since become the name of an asset, so it must not be used for variables.
TRAINING_SUBMIT = """
    --clean-pod-policy --compute --datasource --datavolume --empty-dir-volume --env-my-credentials --env-pod-field-ref
    --env-secret --environment-variable --exclude-node --image-pull-my-credentials --master-command
    --master-environment-variable --master-restart-policy --preemptibility --priority --privileged --restart-policy
    --run-as-non-root --secret-volume --template --termination-grace-period
"""
AMBIGUOUS = {"--environment", "--master-environment"}
SWITCHES = {"--large-shm", "--command"}


@pytest.fixture
def submitted(tmp_path: Path) -> list[str]:
    """The words that the script gives to runai, caught by one of its name."""
    runai = tmp_path / "runai"
    runai.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    runai.chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PROJECT": "research", "IMAGE": "titan:1", "WORKERS": "3"}
    done = subprocess.run(
        [SCRIPT, "model=llama3_8b", "data.path=/a b/*.gz"],
        env=variables,
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
    )
    return done.stdout.splitlines()


def unknown(words: list[str]) -> list[str]:
    """Return the words before the command that are flags, but none of Run:ai's."""
    published = set(f"{PYTORCH_SUBMIT} {TRAINING_SUBMIT}".split()) - AMBIGUOUS
    return [word for word in words[: words.index("--")] if word.startswith("-") and word not in published]


def test_it_is_bash() -> None:
    """Bash can read the script."""
    done = subprocess.run(["bash", "-n", SCRIPT], capture_output=True, text=True, timeout=10)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_flag_is_published(submitted: list[str]) -> None:
    """Run:ai has all the flags that the script uses; one that is misspelt is found."""
    assert unknown(submitted) == []
    assert unknown(["--gpu-device-request", "8", "--"]) == ["--gpu-device-request"]


def test_what_is_submitted(submitted: list[str]) -> None:
    """Each flag has its value, all pods get the same GPUs, and overrides arrive unchanged, blanks included."""
    assert submitted[:4] == ["training", "pytorch", "submit", "titan"]
    end = submitted.index("--")
    flags: dict[str, list[str]] = {}
    rest = iter(submitted[4:end])
    for word in rest:
        assert re.match(r"--\w", word)
        flags.setdefault(word, []).append("" if word in SWITCHES else next(rest))
    assert flags["--workers"] == ["3"]
    assert flags["--gpu-devices-request"] == flags["--master-gpu-devices-request"] == ["8"]
    assert flags["--existing-pvc"] == ["claimname=titan,path=/shared"]
    assert submitted[end + 1 :] == [
        *("python", "-m", "titan.launch.torchrun", "--nproc-per-node", "8"),
        *("-m", "titan.train", "model=llama3_8b", "data.path=/a b/*.gz"),
    ]
