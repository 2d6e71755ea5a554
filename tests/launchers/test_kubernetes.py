"""The manifests, against the schemas that Kubernetes and Kubeflow publish, and against each other."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import kubeflow.training.models as pytorchjob_models
import kubeflow_trainer_api.models as trainjob_models
import kubernetes_validate
import pytest

from titan.errors import CheckpointError, ConfigError, DataError, NonFiniteError, StorageError

from .files import DOCKERFILE, Object, commands, job_specs, object_of, objects, pod_templates

VERSIONS = ["1.31", kubernetes_validate.latest_version()]
"""The first Kubernetes in which podFailurePolicy was final, and the newest whose schemas are there."""
CORE = ["storage.yaml", "job.yaml"]
FINAL = {error.exit_code for error in (ConfigError, DataError, CheckpointError, NonFiniteError)}
REQUEUE = 75

PRIMITIVES = {"str": str, "int": int, "bool": bool, "float": float}


class Refused(Exception):
    """A schema does not have what an object says."""


def hold_core(found: Object, version: str = VERSIONS[-1]) -> None:
    """Hold an object of Kubernetes' own against its schema, in which an unknown field is an error."""
    try:
        kubernetes_validate.validate(found, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        raise Refused(error.message) from error


def hold_trainer(found: Object) -> None:
    """Hold an object of Kubeflow Trainer against its models; they drop what they do not know, so look what is left."""
    model = getattr(trainjob_models, f"TrainerV1alpha1{found['kind']}")
    try:
        understood = model.from_dict(copy.deepcopy(found)).to_dict()
    except ValueError as error:  # pydantic's
        raise Refused(str(error)) from error
    lose_nothing(found, understood, found["kind"])


def lose_nothing(said: Any, understood: Any, path: str) -> None:
    """Refuse what was said but not understood."""
    if isinstance(said, dict):
        for key, value in said.items():
            if key not in understood:
                raise Refused(f"{path}.{key}")
            lose_nothing(value, understood[key], f"{path}.{key}")
    elif isinstance(said, list):
        for index, value in enumerate(said):
            lose_nothing(value, understood[index], f"{path}[{index}]")
    elif said != understood:
        raise Refused(f"{path}: {said!r} was read as {understood!r}")


def hold_pytorchjob(found: Any, kind: str = "KubeflowOrgV1PyTorchJob", path: str = "PyTorchJob") -> None:
    """Hold a PyTorchJob against its models, which carry the published schema but do not enforce it.

    Their parts that are Kubernetes' own (V1...) have a schema of their own.
    """
    if kind.startswith("V1"):
        return
    if kind in PRIMITIVES:
        if type(found) is not PRIMITIVES[kind]:
            raise Refused(f"{path} = {found!r} is no {kind}")
    elif match := re.fullmatch(r"dict\(str, (\w+)\)", kind):
        for key, value in found.items():
            hold_pytorchjob(value, match[1], f"{path}.{key}")
    else:
        model = getattr(pytorchjob_models, kind)
        known = {name: model.openapi_types[attribute] for attribute, name in model.attribute_map.items()}
        for key, value in found.items():
            if key not in known:
                raise Refused(f"{path}.{key}")
            hold_pytorchjob(value, known[key], f"{path}.{key}")


def as_pod(template: Object) -> Object:
    """Return a pod's template as the pod that will be made of it."""
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template}


def as_job(specification: Object) -> Object:
    """Return a Job's specification as the Job that will be made of it."""
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, "spec": specification}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", CORE)
def test_core_objects_fit_their_schemas(name: str, version: str) -> None:
    """Kubernetes' own objects have no unknown field and no wrong type, in an old version and in the newest."""
    assert objects(name)
    for found in objects(name):
        hold_core(found, version)


def test_trainer_objects_fit_their_models() -> None:
    """Kubeflow Trainer understands all that the TrainJob and its runtime say."""
    assert [found["kind"] for found in objects("trainjob.yaml")] == ["TrainingRuntime", "TrainJob"]
    for found in objects("trainjob.yaml"):
        hold_trainer(found)


def test_the_pytorchjob_fits_its_models() -> None:
    """The training operator knows all that the PyTorchJob says."""
    hold_pytorchjob(object_of("pytorchjob.yaml", "PyTorchJob"))


@pytest.mark.parametrize("version", VERSIONS)
def test_embedded_pods_and_jobs_fit_kubernetes(version: str) -> None:
    """What the operators will make of their templates are pods and Jobs that Kubernetes accepts."""
    for template in pod_templates().values():
        hold_core(as_pod(template), version)
    for specification in job_specs().values():
        hold_core(as_job(specification), version)


def misspell(found: Object, path: str) -> Object:
    """Return an object with a letter more in one of its fields."""
    spoilt = copy.deepcopy(found)
    *parents, last = path.split(".")
    place: Any = spoilt
    for key in parents:
        place = place[int(key)] if key.isdigit() else place[key]
    place[f"{last}x"] = place.pop(last)
    return spoilt


@pytest.mark.parametrize(
    ("hold", "name", "kind", "path"),
    [
        (hold_core, "storage.yaml", "PersistentVolumeClaim", "spec.accessModes"),
        (hold_core, "job.yaml", "Service", "spec.publishNotReadyAddresses"),
        (hold_core, "job.yaml", "Job", "spec.podFailurePolicy.rules.0.onExitCodes.containerName"),
        (hold_core, "job.yaml", "Job", "spec.template.spec.terminationGracePeriodSeconds"),
        (hold_trainer, "trainjob.yaml", "TrainJob", "spec.trainer.numProcPerNode"),
        (hold_trainer, "trainjob.yaml", "TrainJob", "spec.runtimeRef"),
        (
            hold_trainer,
            "trainjob.yaml",
            "TrainingRuntime",
            "spec.template.spec.replicatedJobs.0.template.spec.template.spec.volumes.1.emptyDir.sizeLimit",
        ),
        (hold_pytorchjob, "pytorchjob.yaml", "PyTorchJob", "spec.nprocPerNode"),
        (hold_pytorchjob, "pytorchjob.yaml", "PyTorchJob", "spec.runPolicy.backoffLimit"),
        (hold_pytorchjob, "pytorchjob.yaml", "PyTorchJob", "spec.pytorchReplicaSpecs.Worker.restartPolicy"),
    ],
)
def test_a_misspelt_field_is_refused(hold: Callable[[Object], None], name: str, kind: str, path: str) -> None:
    """A letter too much is found, at any depth: the schemas can say no."""
    found = object_of(name, kind)
    hold(found)
    with pytest.raises(Refused):
        hold(misspell(found, path))


def test_a_wrong_type_is_refused() -> None:
    """A number where text belongs, and text where a number does, are found."""
    wrong = object_of("pytorchjob.yaml", "PyTorchJob")
    wrong["spec"]["nprocPerNode"] = 8
    with pytest.raises(Refused):
        hold_pytorchjob(wrong)
    wrong = object_of("trainjob.yaml", "TrainJob")
    wrong["spec"]["trainer"]["numNodes"] = "two"
    with pytest.raises(Refused):
        hold_trainer(wrong)


@pytest.mark.parametrize("where", job_specs())
def test_failures_are_retried_by_their_exit_codes(where: str) -> None:
    """What would happen again ends the Job, what asks to be requeued is no failure, and all else is tried again."""
    specification = job_specs()[where]
    actions: dict[str, set[int]] = {}
    for rule in specification["podFailurePolicy"]["rules"]:
        if codes := rule.get("onExitCodes"):
            assert codes["containerName"] == specification["template"]["spec"]["containers"][0]["name"]
            assert codes["operator"] == "In"
            actions.setdefault(rule["action"], set()).update(codes["values"])
    assert actions == {"FailJob": FINAL, "Ignore": {REQUEUE}}
    assert StorageError.exit_code not in FINAL
    disrupted = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert disrupted in specification["podFailurePolicy"]["rules"]
    assert specification["template"]["spec"]["restartPolicy"] == "Never"  # or no pod would ever fail


@pytest.mark.parametrize("where", pod_templates())
def test_pods_share_storage_and_have_time_to_save(where: str) -> None:
    """Every pod sees the claim, has shared memory, time after SIGTERM, the image's user, and optional secrets."""
    claim = object_of("storage.yaml", "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    pod = pod_templates()[where]["spec"]
    (container,) = pod["containers"]
    paths = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {paths[volume.pop("name")]: volume for volume in copy.deepcopy(pod["volumes"])}
    assert volumes["/shared"] == {"persistentVolumeClaim": {"claimName": claim["metadata"]["name"]}}
    assert volumes["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert pod["terminationGracePeriodSeconds"] >= 120
    (user,) = re.findall(r"^USER (\d+)$", DOCKERFILE.read_text(), re.M)
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == int(user)
    assert [source["secretRef"]["optional"] for source in container["envFrom"]] == [True]


def test_the_jobs_numbers_and_names_agree() -> None:
    """Nodes are counted alike in all places, ranks are GPUs, and the address of the first pod is what DNS will have."""
    job, service = object_of("job.yaml", "Job"), object_of("job.yaml", "Service")
    flags = dict(flag[2:].split("=") for flag in commands()["job"] if flag.startswith("--"))
    specification, pod = job["spec"], job["spec"]["template"]["spec"]
    assert specification["completionMode"] == "Indexed"
    assert specification["parallelism"] == specification["completions"] == int(flags["nnodes"])
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == int(flags["nproc-per-node"])
    assert flags["node-rank"] == "$(JOB_COMPLETION_INDEX)"
    # an Indexed Job's pod has the host name JOB-INDEX, in the domain of the service that `subdomain` names
    assert flags["master-addr"] == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True


def test_the_operators_numbers_and_names_agree() -> None:
    """Ranks are GPUs, and containers have the names by which the operators know them."""
    job = object_of("pytorchjob.yaml", "PyTorchJob")["spec"]
    for replica in job["pytorchReplicaSpecs"].values():
        (container,) = replica["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"
        assert container["resources"]["limits"]["nvidia.com/gpu"] == int(job["nprocPerNode"])
    runtime, run = objects("trainjob.yaml")
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    (container,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    assert replicated["name"] == container["name"] == "node"
    assert replicated["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    assert run["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert run["spec"]["runtimeRef"]["kind"] == runtime["kind"]
    trainer = run["spec"]["trainer"]
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == trainer["numProcPerNode"]
