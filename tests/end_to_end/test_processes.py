"""Jobs of several processes on one machine: the same steps as in one process, resuming with other
process counts, and what happens when one process dies."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from mpt_jax.artifacts import artifacts
from mpt_jax.checkpointing.checkpoints import Checkpoints, saved_steps
from mpt_jax.core.tree import flatten
from mpt_jax.runtime import preemption
from tests.fixtures import distributed_job, tiny

ROOT = Path(__file__).parents[2]
STAGE = (
    "--gin_file=gin/mpt_source.gin", "--gin_file=gin/tiny.gin",
    "--gin.SOURCE_TASKS=['toy_sst2', 'toy_mnli']", "--gin.BATCH_SIZE=8",
    "--gin.LEARNING_RATE=0.03", "--gin.EVAL_STEPS=1",
    "--gin.EVALUATOR_NUM_EXAMPLES=8",
    "--gin.train.actions={}",  # the last step is compared, not the best
)  # fmt: skip
LAST = 8
EXACT = (*STAGE, f"--gin.TRAIN_STEPS={LAST}", "--gin.SAVE_PERIOD=2", f"--gin.EVAL_PERIOD={LAST}")
LONG = (*STAGE, "--gin.TRAIN_STEPS=100000", "--gin.SAVE_PERIOD=10", "--gin.EVAL_PERIOD=100000")
SHARED = "--gin.paths.under.shared_filesystem=True"
HEARTBEAT = 10
# Sums over rows are rounded differently with several processes: by at most 2.4e-7 after twelve
# steps at this learning rate, for values up to 2.
TOLERANCE = 1e-6


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


def launch(
    arguments: tuple[str, ...], stdout: int | None = None, **environment: str
) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_core(folder: Path, steps: int, count: int) -> list[subprocess.Popen]:
    """Starts `tests.fixtures.distributed_job` in `count` processes."""
    folder.mkdir(exist_ok=True)
    job = ("tests.fixtures.distributed_job", str(folder), str(steps))
    if count == 1:
        return [launch(job)]
    address = free_address()
    return [launch((*job, address, str(count), str(index))) for index in range(count)]


def start(root: Path, count: int, stage: tuple[str, ...], *more: str) -> list[subprocess.Popen]:
    """Starts a stage's command line in `count` processes."""
    job, environment = ("mpt_jax.train", SHARED, *stage, *more), {"MPT_JAX_ROOT": str(root)}
    if count == 1:
        return [launch(job, **environment)]
    given = (f"--coordinator_address={free_address()}", f"--process_count={count}")
    return [
        launch((*job, *given, f"--process_index={index}"), **environment) for index in range(count)
    ]


def finish(children: list[subprocess.Popen], code: int = 0) -> list[str]:
    logs = [child.communicate(timeout=1800)[1] for child in children]
    for child, log in zip(children, logs, strict=True):
        assert child.returncode == code, log[-4000:]
    return logs


def assert_close(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=TOLERANCE, rtol=0, err_msg=name)


# --- The same steps ------------------------------------------------------------------------------


def test_job_two_processes_same_steps_as_one(tmp_path):
    """Tests only the core packages, with distillation."""
    children = start_core(tmp_path / "two", 6, 2)
    (tmp_path / "one").mkdir()
    distributed_job.main(str(tmp_path / "one"), 6)
    finish(children)
    learned = [dict(np.load(tmp_path / name / "learned_6.npz")) for name in ("one", "two")]
    assert_close(learned[1], learned[0])


@pytest.mark.slow
def test_job_resumed_with_other_process_counts_same_result(tmp_path):
    """Tests only the core packages: one, two, four and one processes, each resuming the last."""
    finish(start_core(tmp_path / "one", 12, 1))
    for steps, count in ((3, 1), (6, 2), (9, 4), (12, 1)):
        finish(start_core(tmp_path / "turns", steps, count))
    learned = [dict(np.load(tmp_path / name / "learned_12.npz")) for name in ("one", "turns")]
    assert_close(learned[1], learned[0])


def model_dir(root: Path) -> Path:
    return root / "tiny" / "mpt_source"


def learned(root: Path) -> dict[str, np.ndarray]:
    params = artifacts.load_artifact(model_dir(root) / "artifact").params
    return {name: np.asarray(value) for name, value in flatten(params).items()}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """ROOT of a run in one process."""
    root = tmp_path_factory.mktemp("alone")
    finish(start(root, 1, EXACT))
    return root


@pytest.mark.slow
@pytest.mark.parametrize("turns", [((LAST, 2),), ((2, 1), (4, 2), (6, 4), (LAST, 1))], ids=str)
def test_train_command_several_processes_same_results(tmp_path, alone, turns):
    """Data, training, decoding and scoring, as users start them; each turn is (step, processes)."""
    for step, count in turns:
        logs = finish(start(tmp_path / "turns", count, EXACT, f"--gin.train.total_steps={step}"))
        for index, log in enumerate(logs if count > 1 else ()):
            assert f"Process {index} of {count}." in log
            assert ("Resumed from" in log) == (step > 2 and len(turns) > 1)
    one, found = model_dir(alone), model_dir(tmp_path / "turns")
    assert_close(learned(tmp_path / "turns"), learned(alone))
    for task in ("toy_sst2", "toy_mnli"):
        last, expected = (
            lines(path / "inference_eval" / f"{task}-metrics.jsonl")[-1] for path in (found, one)
        )
        assert last == expected and expected["step"] == LAST
        predicted, decoded = (
            lines(path / "inference_eval" / f"{task}-{LAST:06}.jsonl") for path in (found, one)
        )
        assert predicted == decoded and len(decoded) == 8
    # Only one process writes.
    assert [line["processes"] for line in lines(found / "run.jsonl")] == [c for _, c in turns]
    written = [
        (line["folder"], line["step"])
        for line in lines(found / "metrics.jsonl")
        if "timing/compilation_seconds" not in line  # of every start
    ]
    assert len(written) == len(set(written))


@pytest.mark.slow
def test_train_command_unshared_local_root_refused_by_all(tmp_path):
    unshared = "--gin.paths.under.shared_filesystem=False"
    for log in finish(start(tmp_path, 2, EXACT, unshared), code=2):
        assert "shared_filesystem" in log


def test_checkpoints_one_process_cannot_read_none_resumes(tmp_path):
    """The other process does not wait for it either."""
    model = tiny.model()
    state = tiny.state(model, tiny.params(model))
    saved = Checkpoints(str(tmp_path), None)
    for step in (5, 9):
        saved.save(state.replace(step=np.int32(step)), {})
    saved.close()
    address = free_address()
    children = [
        launch(
            ("tests.fixtures.restore_job", str(tmp_path), address, str(index)),
            stdout=subprocess.PIPE,
        )
        for index in range(2)
    ]
    said = [child.communicate(timeout=120) for child in children]
    expected = (["another process"] * 2, ["Timeout", "PERMISSION"])
    for (out, log), reasons in zip(said, expected, strict=True):
        lines = dict(line.split(": ", 1) for line in out.splitlines() if ": " in line)
        for way, reason in zip(("no answer", "no access"), reasons, strict=True):
            assert "checkpoint_9 could not be read now" in lines[way], log[-3000:]
            assert reason in lines[way]
        assert lines["damage"] == "5", log[-3000:]
    assert saved_steps(epath.Path(tmp_path)) == [5, 9]


# --- When one dies -------------------------------------------------------------------------------

GLOO = "INTERNAL: Error dispatching computation: Gloo all-reduce failed: [gloo/tcp/pair.cc:538] "


def ends_with(error: Exception, monkeypatch) -> int | None:
    """The exit code of one of two processes, or None if the call returns."""

    class Ended(Exception):
        pass

    def end(code):
        raise Ended(code)

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(os, "_exit", end)
    try:
        preemption.exit_if_peer_lost(error)
    except Ended as ended:
        return ended.args[0]
    return None


@pytest.mark.parametrize(
    "said",
    [
        GLOO + "Read error [127.0.0.1]:11668: Connection reset by peer",  # jax 0.10.2
        GLOO + "Connection closed by peer [127.0.0.1]:28048",
        GLOO + "Timed out waiting 1800000ms for recv operation to complete",
        "DEADLINE_EXCEEDED: Barrier timed out. Barrier_id: PjRT_Client_Connect.",
        "UNAVAILABLE: Task /job:jax_worker/replica:0/task:37 heartbeat timeout.",
        "INTERNAL: the coordination service found a fatal error",
        "ABORTED: all-reduce was canceled",
    ],
)
def test_exit_if_peer_lost_peer_error_exits_for_retry(said, monkeypatch):
    assert ends_with(jax.errors.JaxRuntimeError(said), monkeypatch) == 75


@pytest.mark.parametrize(
    "said",
    [
        "INVALID_ARGUMENT: Argument 'preempted' has another shape",
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes",
        "UNIMPLEMENTED: no heartbeat on this device",
        "INTERNAL: Mosaic failed to compile TPU kernel: unsupported shape cast",
        "INTERNAL: during context [pre-optimization]: RET_CHECK failure",
        "NOT_FOUND: no executable with this name",
        "FAILED_PRECONDITION: Buffer has been deleted or donated.",
    ],
)
def test_exit_if_peer_lost_own_error_returns(said, monkeypatch):
    assert ends_with(jax.errors.JaxRuntimeError(said), monkeypatch) is None


def test_exit_if_peer_lost_compiler_error_returns(monkeypatch):
    """The error comes from the compiler itself."""
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        lowered = jax.jit(jnp.sin).lower(1.0)
        lowered.compile(compiler_options={"xla_no_such_flag": 1})
    assert ends_with(caught.value, monkeypatch) is None


def test_exit_if_peer_lost_single_process_returns(monkeypatch):
    error = jax.errors.JaxRuntimeError("UNAVAILABLE: heartbeat")
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail(f"ended with {code}"))
    preemption.exit_if_peer_lost(error)


@pytest.mark.slow
@pytest.mark.parametrize(
    "victim, number",
    [(1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP)],
    ids=["one is killed", "the first is killed", "one stands still"],
)
def test_job_one_process_lost_others_exit_and_resume(tmp_path, victim, number):
    children = start(tmp_path, 2, LONG, f"--heartbeat_timeout={HEARTBEAT}")
    survivor = children[1 - victim]
    try:
        while not list(model_dir(tmp_path).glob("checkpoint_?0")):
            assert all(child.poll() is None for child in children)
            time.sleep(0.05)
        time.sleep(random.Random(victim + number).uniform(0, 2))
        children[victim].send_signal(number)
        before = time.monotonic()
        log = survivor.communicate(timeout=600)[1]
        seconds = time.monotonic() - before
    finally:
        for child in children:
            child.kill()
            child.communicate()
    print(f"victim {victim}, {number.name}: ended after {seconds:.1f} s with {survivor.returncode}")
    assert seconds < 3 * HEARTBEAT
    assert survivor.returncode in (75, -signal.SIGABRT), log[-4000:]
    assert "A computation across the 2 processes" in log or "another task died" in log
    assert f"ends within {HEARTBEAT} s (--heartbeat_timeout)" in log
    # The same command resumes, also in a single process.
    saved = saved_steps(epath.Path(model_dir(tmp_path)))[-1]
    (log,) = finish(start(tmp_path, 1, LONG, f"--gin.train.total_steps={saved + 2}"))
    assert f"checkpoint_{saved}." in log
