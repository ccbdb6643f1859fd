"""tpu/gke.sh and tpu/xpk.sh: the commands, and the manifest against Kubernetes' schemas."""

import base64
import math
import re
import shlex
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from tests.fixtures.fake_gcloud import COMMAND, ROOT, Clouds, common

# Fields of a JobSet (jobset.x-k8s.io/v1alpha2), limited to the parts that the manifest uses.
JOBSET = {
    "spec": {"failurePolicy", "replicatedJobs"},
    "failurePolicy": {"maxRestarts", "rules", "restartStrategy"},
    "rule": {"name", "action", "onJobFailureReasons", "targetReplicatedJobs"},
    "replicatedJob": {"name", "replicas", "template"},
}


@pytest.fixture
def clouds(tmp_path) -> Clouds:
    return Clouds(tmp_path)


def launch(clouds: Clouds, *more: str, script: str = "gke.sh", **others: str):
    return clouds.launch(script, *common(cluster="c", **others), *more, *COMMAND)


def manifest(clouds: Clouds, *more: str, **others: str) -> dict:
    done = launch(clouds, *more, **others)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(clouds.stdin())


def pod_of(found: dict) -> dict:
    return found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize(
    "kind, slices", [("v5litepod-16", 1), ("v5litepod-8", 2), ("v5p-32", 2), ("v6e-256", 1)]
)
def test_gke_manifest_consistent_with_accelerator(clouds, kind, slices):
    found = manifest(clouds, f"--slices={slices}", type=kind)
    job = found["spec"]["replicatedJobs"][0]
    spec, pod = job["template"]["spec"], pod_of(found)
    selector, container = pod["nodeSelector"], pod["containers"][0]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"] == {"google.com/tpu": chips}
    topology = selector["cloud.google.com/gke-tpu-topology"]
    total = math.prod(map(int, topology.split("x")))
    assert spec["parallelism"] == spec["completions"] == total // chips
    assert job["replicas"] == slices
    assert total == int(kind.rsplit("-")[1]) // (2 if kind.startswith("v5p") else 1)
    label = {"v5l": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice"}[
        kind[:3]
    ]
    assert selector == {
        "cloud.google.com/gke-tpu-accelerator": label,
        "cloud.google.com/gke-tpu-topology": topology,
    }
    annotation = found["metadata"]["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"]
    assert annotation == "cloud.google.com/gke-nodepool"


def test_gke_manifest_valid_jobset_and_kubernetes_job(clouds):
    found = manifest(clouds, "--spot", "--slices=2")
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(found["spec"]) <= JOBSET["spec"]
    policy = found["spec"]["failurePolicy"]
    assert set(policy) <= JOBSET["failurePolicy"]
    assert all(set(rule) <= JOBSET["rule"] for rule in policy["rules"])
    (job,) = found["spec"]["replicatedJobs"]
    assert set(job) <= JOBSET["replicatedJob"]
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **job["template"]}
    kubernetes_validate.validate(whole, "1.32", strict=True)
    whole["spec"]["paralellism"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(whole, "1.32", strict=True)


def outcome(found: dict, code: int, disrupted: bool) -> str:
    """Returns the JobSet's action after a pod ends this way."""
    spec = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    action = "Count"
    for rule in spec["podFailurePolicy"]["rules"]:
        conditions = {(c["type"], c["status"]) for c in rule.get("onPodConditions", [])}
        codes = rule.get("onExitCodes", {"operator": "In", "values": []})
        inside = code in codes["values"]
        if (disrupted and ("DisruptionTarget", "True") in conditions) or (
            inside if codes["operator"] == "In" else not inside
        ):
            action = rule["action"]
            break
    assert spec["backoffLimit"] == 0, "a slice cannot continue without one of its hosts"
    reason = {"Count": "BackoffLimitExceeded", "FailJob": "PodFailurePolicy"}[action]
    for rule in found["spec"]["failurePolicy"]["rules"]:
        if reason in rule["onJobFailureReasons"]:
            return rule["action"]
    return "RestartJobSet"


def test_gke_manifest_only_exit_75_and_lost_nodes_restart(clouds):
    found = manifest(clouds, "--max-restarts=7")
    assert outcome(found, 75, disrupted=False) == "RestartJobSet"
    assert outcome(found, 137, disrupted=True) == "RestartJobSet"
    assert outcome(found, 75, disrupted=True) == "RestartJobSet"
    for code in (1, 2, 137):
        assert outcome(found, code, disrupted=False) == "FailJobSet"
    assert found["spec"]["failurePolicy"]["maxRestarts"] == 7
    assert pod_of(found)["restartPolicy"] == "Never"


def test_gke_pod_runs_worker_with_given_command(clouds):
    found = manifest(clouds, package="", root='gs://bucket/a "b"', image="host/image:1")
    container = pod_of(found)["containers"][0]
    worker = (ROOT / "tpu" / "worker.sh").read_text()
    assert container["command"] == ["bash", "-c"]
    script, *arguments = container["args"]
    assert script.rstrip() == worker.rstrip()
    assert arguments == ["worker", *COMMAND[1:]]
    # Kubernetes reads $(NAME) and $$ in arguments.
    assert "$$" not in script
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert environment == {"NAME": "mpt-1", "MPT_JAX_ROOT": 'gs://bucket/a "b"', "PACKAGE": ""}
    for name in re.findall(r"\$\((\w+)\)", script):
        assert name not in environment
    assert container["image"] == "host/image:1"


def test_gke_spot_and_node_pools_options(clouds):
    found = manifest(clouds, "--spot", "--node-pools", "--slices=2")
    assert pod_of(found)["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    pools = [call for call in clouds.calls() if "node-pools" in call]
    assert [call[4] for call in pools] == ["mpt-1-0", "mpt-1-1"]
    for call in pools:
        assert {"--machine-type=ct5lp-hightpu-4t", "--num-nodes=4", "--tpu-topology=4x4"} < set(
            call
        )
        assert "--spot" in call


def test_gke_dry_run_prints_manifest_and_runs_nothing(clouds):
    done = launch(clouds, "--dry-run")
    assert done.returncode == 0 and clouds.calls() == []
    commands, text = done.stdout.split("with this manifest:\n")
    assert [line.split()[1] for line in commands.splitlines()] == ["gcloud", "gcloud", "kubectl"]
    assert yaml.safe_load(text)["metadata"]["name"] == "mpt-1"


@pytest.mark.parametrize("script, tool", [("gke.sh", "kubectl"), ("xpk.sh", "xpk")])
def test_launch_script_missing_tool_error_says_how_to_install(tmp_path, script, tool):
    done = launch(Clouds(tmp_path, present=("gcloud",)), script=script)
    assert done.returncode == 2 and f"'{tool}' is not on PATH. Install it:" in done.stderr


def test_gke_missing_jobset_controller_or_local_wheel_fails(clouds):
    clouds.plan(failing={"get crd jobsets.jobset.x-k8s.io": "NotFound"})
    done = launch(clouds)
    assert done.returncode == 2 and "has no JobSet controller. Install it: https://" in done.stderr
    assert not any("apply" in call for call in clouds.calls())
    done = launch(clouds, package="x.whl")
    assert done.returncode == 2 and "which a pod cannot fetch" in done.stderr


def test_xpk_workload_gets_worker_and_command(clouds):
    done = launch(clouds, "--slices=2", script="xpk.sh")
    assert done.returncode == 0, done.stderr
    (call,) = [call for call in clouds.calls() if call[0] == "xpk"]
    assert call[1:3] == ["workload", "create"]
    assert {
        "--workload=mpt-1", "--cluster=c", "--tpu-type=v5litepod-16", "--num-slices=2",
        "--restart-on-exit-codes=75", "--max-restarts=100", "--env=MPT_JAX_ROOT=gs://bucket/mpt",
    } <= set(call)  # fmt: skip
    command = next(word for word in call if word.startswith("--command="))
    assert "\n" not in command, "xpk writes the command into one line of YAML"
    written, run = command.removeprefix("--command=").split("; ", 1)
    text = base64.b64decode(shlex.split(written)[1]).decode()
    assert text == Path(ROOT / "tpu" / "worker.sh").read_text()
    assert shlex.split(run) == ["exec", "bash", "/tmp/worker.sh", *COMMAND[1:]]
