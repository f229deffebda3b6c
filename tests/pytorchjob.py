"""What Kubeflow's training-operator 1.9 makes of a PyTorchJob: its webhook's complaints, and the pods' environment.

Own words for the operator's rules (kubeflow/training-operator, Apache-2.0: `pkg/webhooks/pytorch/pytorchjob_webhook.go`,
`pkg/common/util/webhooks.go`, `pkg/controller.v1/pytorch/envvar.go`, `elastic.go`, `master.go`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from tests.harness import REPOSITORY

Job = dict[str, Any]
"""A PyTorchJob as its YAML says it."""

CONTAINER, PORT_NAME, PORT = "pytorch", "pytorchjob-port", 23456
CONTROLLERS = ("kubeflow.org/training-operator", "kueue.x-k8s.io/multikueue")
REPLICA_TYPES = ("Master", "Worker")


def read_job(path: Path = REPOSITORY / "launch" / "pytorchjob.yaml") -> Job:
    """The job of the repository."""
    job: Job = yaml.safe_load(path.read_text(encoding="utf-8"))
    return job


def complaints(job: Job) -> list[str]:
    """What the webhook refuses the job for; each with the field's path."""
    spec = job.get("spec", {})
    found = _name_complaints(job.get("metadata", {}).get("name", ""))
    manager = spec.get("runPolicy", {}).get("managedBy")
    if manager is not None and manager not in CONTROLLERS:
        found.append(f"spec.runPolicy.managedBy: {manager} is none of {CONTROLLERS}")
    if "nProcPerNode" in spec.get("elasticPolicy", {}) and "nprocPerNode" in spec:
        found.append("spec.elasticPolicy.nProcPerNode: must not be used with spec.nprocPerNode")
    replicas = spec.get("pytorchReplicaSpecs")
    if not replicas:
        found.append("spec.pytorchReplicaSpecs: required")
    for kind, replica in (replicas or {}).items():
        found += _replica_complaints(f"spec.pytorchReplicaSpecs[{kind}]", kind, replica)
    return found


def _name_complaints(name: str) -> list[str]:
    # A DNS-1035 label: it is part of the name of a service.
    if len(name) > 63 or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        return [f"metadata.name: {name!r} is not a DNS-1035 label"]
    return []


def _replica_complaints(path: str, kind: str, replica: Job) -> list[str]:
    found = [] if kind in REPLICA_TYPES else [f"{path}: is none of {REPLICA_TYPES}"]
    containers = replica.get("template", {}).get("spec", {}).get("containers") or []
    if not containers:
        found.append(f"{path}.template.spec.containers: required")
    found += [f"{path}.template.spec.containers[{i}].image: required" for i, c in enumerate(containers) if not c.get("image")]
    if CONTAINER not in [container.get("name") for container in containers]:
        found.append(f"{path}.template.spec.containers: none has the name {CONTAINER}")
    if kind == "Master" and replica.get("replicas") != 1:
        found.append(f"{path}.replicas: must be 1")
    return found


def container(job: Job, kind: str) -> Job:
    """The container that trains, in pods of this kind (`Master` or `Worker`)."""
    containers = job["spec"]["pytorchReplicaSpecs"][kind]["template"]["spec"]["containers"]
    found: Job = next(c for c in containers if c["name"] == CONTAINER)
    return found


def pod_environment(job: Job, kind: str, index: int) -> dict[str, str]:
    """What stands in the environment of a pod's container: its own `env`, and what the operator adds."""
    own = {variable["name"]: variable["value"] for variable in container(job, kind).get("env", [])}
    return {**own, "PYTHONUNBUFFERED": "1", **_cluster(job, kind, index), **_elastic(job)}


def _cluster(job: Job, kind: str, index: int) -> dict[str, str]:
    """Meant for jobs without torchrun, which gives its processes others of the same names."""
    spec = job["spec"]
    if "Master" not in spec["pytorchReplicaSpecs"]:
        return {}
    processes = spec.get("nprocPerNode", "auto")
    num_pods = sum(replica.get("replicas", 1) for replica in spec["pytorchReplicaSpecs"].values())
    rank = index + 1 if kind == "Worker" else index
    address, port = f"{job['metadata']['name']}-master-0", str(_port(job, "Master"))
    return {
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
        "PET_MASTER_ADDR": address,
        "PET_MASTER_PORT": port,
        "WORLD_SIZE": str(num_pods * (int(processes) if processes.isdigit() else 1)),
        "RANK": str(rank),
        "PET_NPROC_PER_NODE": processes,
        "PET_NODE_RANK": str(rank),
    }


def _elastic(job: Job) -> dict[str, str]:
    policy = job["spec"].get("elasticPolicy")
    if policy is None:
        return {}
    host = policy.get("rdzvHost", f"{job['metadata']['name']}-worker-0")
    workers = job["spec"]["pytorchReplicaSpecs"]["Worker"].get("replicas", 1)
    bounded = "minReplicas" in policy or "maxReplicas" in policy
    found = {
        "PET_RDZV_ENDPOINT": f"{host}:{policy.get('rdzvPort', _port(job, 'Worker'))}",
        "PET_RDZV_BACKEND": policy.get("rdzvBackend", "c10d"),
        "PET_NNODES": f"{policy['minReplicas']}:{policy['maxReplicas']}" if bounded else str(workers),
    }
    if "maxRestarts" in policy:
        found["PET_MAX_RESTARTS"] = str(policy["maxRestarts"])
    if "rdzvId" in policy:
        found["PET_RDZV_ID"] = policy["rdzvId"]
    if "rdzvConf" in policy:
        found["PET_RDZV_CONF"] = ",".join(f"{entry['key']}={entry['value']}" for entry in policy["rdzvConf"])
    if policy.get("standalone"):
        found["PET_STANDALONE"] = ""
    return found


def _port(job: Job, kind: str) -> int:
    ports = container(job, kind).get("ports", [])
    return next((int(port["containerPort"]) for port in ports if port.get("name") == PORT_NAME), PORT)


def risks(job: Job) -> list[str]:
    """What the operator accepts, and what would end or cripple this job when a machine goes away."""
    spec = job["spec"]
    policy, run = spec["elasticPolicy"], spec["runPolicy"]
    kinds = spec["pytorchReplicaSpecs"]
    settings = {entry["key"]: float(entry["value"]) for entry in policy.get("rdzvConf", [])}
    num_pods = sum(replica["replicas"] for replica in kinds.values())
    judged = {
        "elasticPolicy.rdzvHost is not the Master": policy.get("rdzvHost") == f"{job['metadata']['name']}-master-0",
        "elasticPolicy.maxReplicas leaves pods waiting": policy["maxReplicas"] >= num_pods,
        "elasticPolicy.minReplicas: the Master alone must be enough": policy["minReplicas"] == 1,
        "elasticPolicy.standalone gives torchrun an empty flag": "standalone" not in policy,
        "elasticPolicy.maxRestarts is used up by changes of membership": policy["maxRestarts"] >= 100,
        "rdzvConf: last_call_timeout is waited out at each loss": settings.get("last_call_timeout", 30) <= 5,
        "runPolicy.backoffLimit counts restarts that are meant": "backoffLimit" not in run,
        "runPolicy.cleanPodPolicy leaves pods waiting after the end": run.get("cleanPodPolicy") == "Running",
    }
    found = [risk for risk, is_well in judged.items() if not is_well]
    for kind, replica in kinds.items():
        found += [f"{kind}: {risk}" for risk in _pod_risks(job, kind, replica)]
    return found


def _pod_risks(job: Job, kind: str, replica: Job) -> list[str]:
    pod, trainer = replica["template"]["spec"], container(job, kind)
    own = {variable["name"]: variable.get("value") for variable in trainer.get("env", [])}
    short = {t["key"].rpartition("/")[2] for t in pod["tolerations"] if t.get("tolerationSeconds", 300) <= 30}
    shm = next((m["name"] for m in trainer["volumeMounts"] if m["mountPath"] == "/dev/shm"), "")
    memory: Job = next((volume.get("emptyDir", {}) for volume in pod["volumes"] if volume["name"] == shm), {})
    places = str(pod.get("affinity", {}))
    judged = {
        "restartPolicy takes an exit code for the end": replica["restartPolicy"] == "OnFailure",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE is not 1": own.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") == "1",
        "command replaces the image's tini": "command" not in trainer,
        "args are not torchrun's of the job": trainer["args"][:2] == ["torchrun", "elastic_train.py"],
        "nvidia.com/gpu differs from nprocPerNode": trainer["resources"]["limits"]["nvidia.com/gpu"] == job["spec"]["nprocPerNode"],
        "/dev/shm is not memory with a limit": memory.get("medium") == "Memory" and "sizeLimit" in memory,
        "not-ready and unreachable are tolerated for 300 s": {"not-ready", "unreachable"} <= short,
        "terminationGracePeriodSeconds: torchrun takes 30 s": pod["terminationGracePeriodSeconds"] > 30,
        "spot machines are not chosen as they should be": ("NotIn" in places) == (kind == "Master") and "gke-spot" in places,
    }
    return [risk for risk, is_well in judged.items() if not is_well]
