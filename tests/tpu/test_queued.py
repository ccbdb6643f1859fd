"""tpu/queued.sh: its gcloud calls, and its reaction to preempted machines."""

import re
import shlex

import pytest

from tests.fixtures.fake_gcloud import COMMAND, Clouds, common

ACTIVE, GONE = "ACTIVE", "SUSPENDED"


@pytest.fixture
def clouds(tmp_path) -> Clouds:
    return Clouds(tmp_path)


def launch(clouds: Clouds, *more: str, **others: str):
    return clouds.launch("queued.sh", *common(**others), *more, *COMMAND)


def test_queued_dry_run_prints_commands_and_runs_none(clouds):
    done = launch(clouds, "--dry-run", "--spot", "--slices=2")
    assert done.returncode == 0, done.stderr
    assert clouds.calls() == []
    printed = [shlex.split(line.removeprefix("+ ")) for line in done.stdout.splitlines()]
    verbs = [line[4] if "queued-resources" in line else line[1] for line in printed]
    assert verbs == ["storage", "create", "describe", "scp", "ssh", "delete"]
    where = ["--project=p", "--zone=us-west4-a"]
    assert printed[1][4:] == [
        "create", "mpt-1", *where, "--node-count=2", "--node-prefix=mpt-1",
        "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot",
    ]  # fmt: skip


def test_queued_command_runs_on_every_host_then_deletes_resource(clouds):
    clouds.plan(runs=[([0] * 4, ACTIVE)], created=["WAITING_FOR_RESOURCES"])
    done = launch(clouds)
    assert done.returncode == 0, done.stderr
    assert clouds.verbs() == ["create", "scp", "ssh", "delete"]
    create, scp, ssh = (c for c in clouds.calls() if {"create", "scp", "ssh"} & set(c[4:5]))
    assert "--node-id=mpt-1" in create and "--spot" not in create
    for call in (scp, ssh):
        assert {"--worker=all", "--node=all", "--batch-size=all"} <= set(call)
    remote = shlex.split(ssh[-1].removeprefix("--command="))
    assert remote == [
        "env", "NAME=mpt-1", "MPT_JAX_ROOT=gs://bucket/mpt",
        "PACKAGE=git+https://host/o/mpt-jax@abc", "MPT_JAX_DISTRIBUTED=1",
        "bash", "mpt_jax_worker.sh", *COMMAND[1:],
    ]  # fmt: skip


def test_queued_single_host_is_not_distributed(clouds):
    clouds.plan(runs=[([0], ACTIVE)])
    assert launch(clouds, type="v6e-8").returncode == 0
    assert not any("MPT_JAX_DISTRIBUTED" in word for call in clouds.calls() for word in call)


@pytest.mark.parametrize(
    "first",
    [[75] * 4, [0, 75, 75, 75], [75, 75], []],
    ids=["saved", "one was done", "two were cut off", "no connection"],
)
def test_queued_saved_or_interrupted_command_restarts_on_same_slice(clouds, first):
    clouds.plan(runs=[(first, ACTIVE), ([0] * 4, ACTIVE)])
    done = launch(clouds, "--keep")
    assert done.returncode == 0, done.stderr
    assert clouds.verbs() == ["create", "scp", "ssh", "scp", "ssh"]


def test_queued_preempted_slice_is_requested_again(clouds):
    clouds.plan(runs=[([75, 1], GONE), ([0] * 4, ACTIVE)])
    done = launch(clouds, "--spot")
    assert done.returncode == 0, done.stderr
    assert clouds.verbs() == ["create", "scp", "ssh", "delete", "create", "scp", "ssh", "delete"]


def test_queued_failed_request_is_repeated(clouds):
    clouds.plan(runs=[([0] * 4, ACTIVE)], created=["FAILED", "PROVISIONING"])
    assert launch(clouds).returncode == 0
    assert clouds.verbs() == ["create", "delete", "create", "scp", "ssh", "delete"]


def test_queued_failed_command_exits_with_its_code_and_reports_cost(clouds):
    clouds.plan(runs=[([75, 75, 2, 75], ACTIVE)])
    done = launch(clouds)
    assert done.returncode == 2
    assert "exit code 2; logs are in gs://bucket/mpt/logs/mpt-1" in done.stderr
    assert "gcloud compute tpus queued-resources delete mpt-1" in done.stderr
    assert clouds.verbs() == ["create", "scp", "ssh"]


def test_queued_max_restarts_limits_restarts(clouds):
    clouds.plan(runs=[([75] * 4, ACTIVE)] * 9)
    done = launch(clouds, "--max-restarts=2")
    assert done.returncode == 2 and "after 2 restarts" in done.stderr
    assert clouds.verbs().count("ssh") == 3


@pytest.mark.parametrize("others", [-1, 75], ids=["no host", "one host"])
def test_queued_failed_installation_is_tried_twice(clouds, others):
    clouds.plan(runs=[([-1, others, others, others], ACTIVE)] * 9)
    done = launch(clouds)
    assert done.returncode == 2
    assert "2 starts in a row failed early in the same way" in done.stderr
    assert "worker host-0 could not be prepared: 1" in done.stderr
    assert "If pip failed, check --package 'git+https://host/o/mpt-jax@abc'." in done.stderr
    assert "gcloud compute tpus queued-resources delete mpt-1" in done.stderr
    assert clouds.verbs() == ["create", *["scp", "ssh"] * 2]


def test_queued_silent_hosts_are_tried_ten_times(clouds):
    clouds.plan(runs=[([], ACTIVE)] * 19)
    done = launch(clouds)
    assert done.returncode == 2 and "no host of mpt-1 answered" in done.stderr
    assert clouds.verbs().count("ssh") == 10


@pytest.mark.parametrize(
    "runs",
    [
        [([-1] * 4, ACTIVE), ([-1] * 3, ACTIVE), ([-1] * 4, ACTIVE)],
        [([-1] * 4, ACTIVE), ([75] * 4, ACTIVE), ([-1] * 4, ACTIVE)],
        [([-1] * 4, GONE)] * 3,
    ],
    ids=["in different ways", "with a run between", "on other machines"],
)
def test_queued_occasional_preparation_failure_restarts(clouds, runs):
    clouds.plan(runs=[*runs, ([0] * 4, ACTIVE)])
    done = launch(clouds)
    assert done.returncode == 0, done.stderr
    assert clouds.verbs().count("ssh") == 4


def test_queued_late_failures_do_not_stop_restarts(clouds):
    clouds.plan(runs=[*[([-1] * 4, ACTIVE)] * 5, ([0] * 4, ACTIVE)])
    done = clouds.launch("queued.sh", *common(), *COMMAND, EARLY="0")
    assert done.returncode == 0, done.stderr


def test_queued_local_wheel_is_uploaded_to_bucket(clouds):
    wheel = clouds.folder / "mpt_jax-1-py3-none-any.whl"
    wheel.touch()
    clouds.plan(runs=[([0] * 4, ACTIVE)])
    assert launch(clouds, package=str(wheel)).returncode == 0
    assert ["gcloud", "storage", "cp", str(wheel), "gs://bucket/mpt/packages/"] in clouds.calls()
    ssh = next(call for call in clouds.calls() if "ssh" in call)
    assert f"PACKAGE=gs://bucket/mpt/packages/{wheel.name} " in ssh[-1]


@pytest.mark.parametrize(
    "others, message",
    [
        ({"type": "v5e-16"}, "unknown --type 'v5e-16'; .*v5litepod-16.*v6e-8"),
        ({"root": "runs"}, "--root 'runs' must be a bucket path"),
        ({"name": "A_b"}, "--name 'A_b' must be at most 30"),
        ({"slices": "0"}, "--slices must be a positive integer, but got '0'"),
        ({"package": "x.whl"}, "--package 'x.whl' is not a file"),
        ({"zone": ""}, "missing --zone"),
        ({"nme": "x"}, "unknown option '--nme=x'"),
    ],
)
def test_queued_invalid_options_fail_before_creation(clouds, others, message):
    done = launch(clouds, **others)
    assert done.returncode == 2
    assert re.search(message, done.stderr), done.stderr
    assert clouds.verbs() == []


def test_queued_without_command_fails(clouds):
    done = clouds.launch("queued.sh", *common())
    assert done.returncode == 2 and "no command; end with: -- mpt_jax.train" in done.stderr


def test_queued_missing_bucket_fails_with_create_command(clouds):
    clouds.plan(failing={"storage ls gs://bucket": "not found: 404"})
    done = launch(clouds)
    assert done.returncode == 2 and clouds.verbs() == []
    assert "cannot see the bucket gs://bucket" in done.stderr
    assert "gcloud storage buckets create gs://bucket --project=p" in done.stderr


def test_queued_gcloud_error_fails_with_its_message(clouds):
    clouds.plan(failing={"compute tpus queued-resources": "PERMISSION_DENIED"})
    done = launch(clouds)
    assert done.returncode == 2 and "gcloud cannot describe mpt-1" in done.stderr
    assert "PERMISSION_DENIED" in done.stderr


def test_queued_without_gcloud_fails(tmp_path):
    done = launch(Clouds(tmp_path, present=()))
    assert done.returncode == 2
    assert "'gcloud' is not on PATH. Install it: https://cloud.google.com/sdk" in done.stderr
