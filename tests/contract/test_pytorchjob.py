"""`launch/pytorchjob.yaml` and `trainjob.yaml`: what the cluster refuses, and what it accepts and should not."""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml

from gai_yolo.config import load_config
from gai_yolo.errors import LEFT, NO_PROGRESS
from gai_yolo.launcher.arguments import add_arguments, settings_from
from tests import pytorchjob
from tests.harness import PATIENCE, REPOSITORY, environment, small
from tests.pytorchjob import Job, complaints, container, pod_environment, read_job

SCHEMA = REPOSITORY / "tests" / "reference" / "pytorchjob.schema.json"
"""Of kubeflow.org/v1 PyTorchJob, from its CRD (Apache-2.0); strict about unknown fields."""
MODELS = ("kubeflow-training==1.9.4", "kubeflow-trainer-api==2.3.0")
Manifests = list[dict[str, Any]]


def trainjob() -> Manifests:
    """The two manifests of `launch/trainjob.yaml`."""
    return list(yaml.safe_load_all((REPOSITORY / "launch" / "trainjob.yaml").read_text(encoding="utf-8")))


def broken(manifest: Job, path: str, value: object) -> Job:
    """A copy with another value at a path such as `spec/elasticPolicy/rdzvHost`; None takes the field away."""
    copied = copy.deepcopy(manifest)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    place: Any = copied
    for part in parents:
        place = place[part]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return copied


REPLICAS = "spec/pytorchReplicaSpecs"
WORKER = f"{REPLICAS}/Worker/template/spec"
MASTER = f"{REPLICAS}/Master/template/spec"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec/elasticPolicy/minReplica", 1),
        ("spec/elasticPolicy/minReplicas", "1"),
        (f"{WORKER}/containers/0/volumeMount", []),
        (f"{REPLICAS}/Worker/restartPolicy", False),
        (REPLICAS, None),
    ],
)
def test_schema_of_the_cluster_accepts_the_job_and_refuses_a_slip(path: str, value: object) -> None:
    """Loss: a manifest that the cluster refuses, or one whose misspelt field it silently drops."""
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
    assert list(validator.iter_errors(read_job())) == []
    assert list(validator.iter_errors(broken(read_job(), path, value)))


@pytest.fixture(scope="module")
def through_models() -> Callable[[Manifests], list[Any]]:
    """Reads manifests into Kubeflow's published models and out again; skips where these cannot be had."""
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("no uv to fetch Kubeflow's models with")
    packages = [word for package in MODELS for word in ("--with", package)]
    python = [uv, "run", "--isolated", "--no-project", "--python", sys.executable, *packages, "python"]
    if subprocess.run([*python, "-c", ""], capture_output=True, timeout=120, check=False).returncode != 0:
        pytest.skip(f"cannot be fetched: {', '.join(MODELS)}")

    def through(manifests: Manifests) -> list[Any]:
        script = [*python, str(Path(__file__).with_name("published_models.py"))]
        done = subprocess.run(script, input=json.dumps(manifests), capture_output=True, text=True, timeout=120, check=True)
        result: list[Any] = json.loads(done.stdout)
        return result

    return through


def test_published_models_know_every_field(through_models: Callable[[Manifests], list[Any]]) -> None:
    """Loss: a field of another version of the API, which does nothing; nobody sees that until machines go away."""
    good = [read_job(), *trainjob()]
    slips = [
        broken(good[0], "spec/elasticPolicy/rdzvTimeout", 3),
        broken(good[0], f"{WORKER}/tolerationSeconds", 3),
        broken(good[1], "spec/template/spec/replicatedJobs/0/template/spec/backoffLimits", 1),
        broken(good[2], "spec/trainer/nodes", 2),
        broken(good[2], "spec/trainer/numNodes", "two"),
    ]
    results = through_models(good + slips)
    assert results[: len(good)] == good
    for slip, result in zip(slips, results[len(good) :], strict=True):
        assert result != slip


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("metadata/name", "0-gai", "metadata.name"),
        ("metadata/name", "gai.yolo", "metadata.name"),
        ("metadata/name", "g" * 64, "metadata.name"),
        ("spec/runPolicy/managedBy", "me", "spec.runPolicy.managedBy"),
        ("spec/elasticPolicy/nProcPerNode", 1, "spec.elasticPolicy.nProcPerNode"),
        (REPLICAS, None, "spec.pytorchReplicaSpecs"),
        (f"{REPLICAS}/Launcher", {"template": {"spec": {"containers": [{"name": "pytorch", "image": "x"}]}}}, "[Launcher]"),
        (f"{REPLICAS}/Master/replicas", 2, "[Master].replicas"),
        (f"{REPLICAS}/Master/replicas", None, "[Master].replicas"),
        (f"{WORKER}/containers", [], "[Worker].template.spec.containers"),
        (f"{WORKER}/containers/0/name", "trainer", "[Worker].template.spec.containers"),
        (f"{MASTER}/containers/0/image", "", "[Master].template.spec.containers[0].image"),
    ],
)
def test_webhook_accepts_the_job_and_refuses_a_broken_one(path: str, value: object, field: str) -> None:
    """Loss: a job that the operator's admission webhook sends back."""
    assert complaints(read_job()) == []
    assert any(field in complaint for complaint in complaints(broken(read_job(), path, value)))


@pytest.mark.parametrize(
    ("path", "value", "word"),
    [
        ("metadata/name", "other", "rdzvHost"),
        ("spec/elasticPolicy/rdzvHost", None, "rdzvHost"),
        ("spec/elasticPolicy/maxReplicas", 3, "maxReplicas"),
        ("spec/elasticPolicy/minReplicas", 2, "minReplicas"),
        ("spec/elasticPolicy/standalone", True, "standalone"),
        ("spec/elasticPolicy/maxRestarts", 3, "maxRestarts"),
        ("spec/elasticPolicy/rdzvConf", [], "last_call_timeout"),
        ("spec/nprocPerNode", "2", "nvidia.com/gpu"),
        ("spec/runPolicy/backoffLimit", 3, "backoffLimit"),
        ("spec/runPolicy/cleanPodPolicy", "None", "cleanPodPolicy"),
        (f"{REPLICAS}/Worker/restartPolicy", "ExitCode", "restartPolicy"),
        (f"{REPLICAS}/Master/restartPolicy", "Never", "restartPolicy"),
        (f"{WORKER}/containers/0/env", [], "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"),
        (f"{WORKER}/containers/0/command", ["torchrun"], "command"),
        (f"{MASTER}/containers/0/args", ["torchrun", "main.py"], "args"),
        (f"{MASTER}/volumes/2", {"name": "shm", "emptyDir": {"sizeLimit": "8Gi"}}, "/dev/shm"),
        (f"{WORKER}/volumes/2", {"name": "shm", "emptyDir": {"medium": "Memory"}}, "/dev/shm"),
        (f"{WORKER}/tolerations", [], "not-ready"),
        (f"{WORKER}/terminationGracePeriodSeconds", 30, "terminationGracePeriodSeconds"),
        (f"{WORKER}/affinity", None, "spot"),
        (f"{MASTER}/affinity", None, "spot"),
    ],
)
def test_job_has_none_of_the_faults_that_the_cluster_accepts(path: str, value: object, word: str) -> None:
    """Loss: a job that runs well until the first machine goes away."""
    assert pytorchjob.risks(read_job()) == []
    assert any(word in risk for risk in pytorchjob.risks(broken(read_job(), path, value)))


def test_manifests_set_what_the_configuration_knows() -> None:
    """Loss: a job that waits an hour for its machines, and then refuses a misspelt key."""
    for arguments in (container(read_job(), "Master")["args"], trainjob()[1]["spec"]["trainer"]["args"]):
        given = arguments[arguments.index("elastic_train.py") + 1 :]
        config = next(word.removeprefix("--config=") for word in given if word.startswith("--config="))
        values = [word.removeprefix("--set=") for word in given if word.startswith("--set=")]
        assert len(values) == len(given) - 1
        assert load_config(REPOSITORY / config, values).run_folder.parts[:2] == ("/", "experiments")


def test_trainjob_starts_as_many_nodes_as_it_asks_for(tmp_path: Path) -> None:
    """Loss: a rendezvous that waits for a node that nobody starts; a line that the launcher refuses."""
    runtime, job = trainjob()
    trainer = job["spec"]["trainer"]
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = [word.replace("=/experiments/", f"={tmp_path}/") for word in trainer["args"]]
    assert arguments[:2] == ["gai-yolo", "launch"]
    settings = settings_from(parser.parse_args(arguments[2:]))
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert trainer["numNodes"] == runtime["spec"]["mlPolicy"]["numNodes"]
    assert settings.min_nodes == settings.max_nodes == trainer["numNodes"]
    assert settings.processes == str(trainer["numProcPerNode"]) == trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    rules = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    codes = {rule["action"]: set(rule["onExitCodes"]["values"]) for rule in rules if "onExitCodes" in rule}
    assert codes == {"FailJob": {2, 3, NO_PROGRESS}, "Ignore": {LEFT}}


def test_network_policies_shut_out_all_but_the_jobs_own_pods() -> None:
    """Loss: a policy that selects no pod, or lets a namespace in; PyTorch's ports take orders from whoever reaches them."""
    text = (REPOSITORY / "launch" / "networkpolicy.yaml").read_text(encoding="utf-8")
    labels = {
        "training.kubeflow.org/job-name": read_job()["metadata"]["name"],
        "jobset.sigs.k8s.io/jobset-name": trainjob()[1]["metadata"]["name"],
    }
    policies = list(yaml.safe_load_all(text))
    for policy, (label, name) in zip(policies, labels.items(), strict=True):
        pods = {"matchLabels": {label: name}}
        assert (policy["apiVersion"], policy["kind"]) == ("networking.k8s.io/v1", "NetworkPolicy")
        assert policy["spec"] == {"podSelector": pods, "policyTypes": ["Ingress"], "ingress": [{"from": [{"podSelector": pods}]}]}


def test_two_pods_run_the_job_with_the_operators_environment(tmp_path: Path, cache: Path) -> None:
    """Loss: a command or an environment of the operator that torchrun or the job does not understand, found out on the cluster."""
    job = read_job()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pods = []
    try:
        for kind in ("Master", "Worker"):
            variables = {**pod_environment(job, kind, 0), "PET_RDZV_ENDPOINT": f"127.0.0.1:{port}"}
            outer = {**environment(), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
            (tmp_path / kind).mkdir()  # a pod has a /dev/shm of its own
            command = [*container(job, kind)["args"], *small(tmp_path, cache, f"elastic.memory_folder={tmp_path / kind}")]
            with (tmp_path / f"{kind}.log").open("wb") as log:
                pod = subprocess.Popen(command, cwd=REPOSITORY, env={**outer, **variables}, stdout=log, stderr=log, start_new_session=True)
            pods.append(pod)
        codes = [pod.wait(PATIENCE) for pod in pods]
    finally:
        for pod in pods:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pod.pid, signal.SIGKILL)
    logs = "\n".join((tmp_path / f"{kind}.log").read_text() for kind in ("Master", "Worker"))
    assert codes == [0, 0], logs
    assert (tmp_path / "run" / "checkpoints" / "epoch_002.pt").exists()
    assert "2 processes on cpu" in logs
