"""`mpt-jax doctor` on machines with problems. A stand-in for JAX reports the devices."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import jax
import pytest

from mpt_jax.cli import doctor, shadows
from mpt_jax.runtime import compilation_cache
from tests.fixtures import tfds_data
from tests.fixtures.processes import run_command, run_script

ROOT = Path(__file__).resolve().parents[2]
VARIABLES = ("MPT_JAX_", "JAX_COORDINATOR", "TPU_", "MEGASCALE_", "TFDS_", "GOOGLE_", "CLOUDSDK_")


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A machine that can run a toy stage: a root, a separate home, a device, no T5X."""
    for name in [name for name in os.environ if name.startswith(VARIABLES)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MPT_JAX_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor, "_DEVICES", 'print(\'["tpu", "TPU v5 lite", 4]\')')
    monkeypatch.setattr(doctor, "MIN_FREE", 0)
    monkeypatch.setattr(
        sys, "path", [path for path in sys.path if not (Path(path) / "t5x").is_dir()]
    )
    return tmp_path


def findings(capsys, *arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Returns the exit code, and the findings by name."""
    code = doctor.main(["--json", "--timeout=60", *arguments])
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] == (code == 0)
    return code, {finding["name"]: finding for finding in found["findings"]}


def only_wrong(capsys, *arguments: str) -> dict[str, str]:
    """Returns the only finding with a problem."""
    code, found = findings(capsys, *arguments)
    (wrong,) = (finding for finding in found.values() if finding["problem"])
    assert code == 1 and wrong["mend"]
    return wrong


def write_t5x(folder: Path, **files: str) -> Path:
    """Writes what looks like a complete T5X; `files` are the contents of some of its modules."""
    contents = dict.fromkeys(("__init__", "train_state", "train", "eval", "infer"), "")
    for name, text in (contents | files).items():
        (folder / "t5x").mkdir(parents=True, exist_ok=True)
        (folder / "t5x" / f"{name}.py").write_text(text)
    return folder


# --- A machine with nothing wrong ----------------------------------------------------------------


def test_doctor_toy_suite_passes(capsys, machine):
    code, found = findings(capsys, "--suite=toy")
    assert code == 0
    assert found["devices"]["value"].startswith("4 x TPU v5 lite (tpu)")
    assert found["processes"]["value"] == "one"
    assert found["trainer"]["value"].startswith("mpt_jax ")
    assert found["jax"]["value"] == jax.__version__
    assert not list(machine.glob("root")), "checks leave no files"
    assert doctor.main(["--suite=toy", "--timeout=60"]) == 0
    assert capsys.readouterr().out.endswith("A stage of the toy suite can start.\n")


def test_doctor_paper_suite_passes(capsys, machine):
    (backbone := machine / "root" / "backbones" / "t5-base").mkdir(parents=True)
    for name in ("config.json", "spiece.model", "model.safetensors"):
        (backbone / name).write_text("")
    for source in doctor.SOURCES:
        name, _, version = source.partition(":")
        (folder := machine / "data" / name / version).mkdir(parents=True)
        (folder / "dataset_info.json").write_text("{}")
    assert findings(capsys, f"--tfds_data_dir={machine / 'data'}")[0] == 0


def test_check_data_tfds_folder_is_found(machine):
    tfds_data.write(machine / "data", "glue/sst2:2.0.0")
    found = {finding.name: finding for finding in doctor.check_data(str(machine / "data"))}
    assert found["glue/sst2:2.0.0"].value == "here"
    assert found["glue/mnli:2.0.0"].value == "absent"


def test_doctor_sources_match_registered_tasks():
    import seqio

    import mpt_jax.tasks.glue
    import mpt_jax.tasks.mrqa
    import mpt_jax.tasks.super_glue  # noqa: F401

    names = ("mnli", "qqp", "qnli", "sst2", "squad", "record")
    assert doctor.SOURCES == tuple(seqio.TaskRegistry.get(name).source.data for name in names)


def test_check_cache_folder_matches_that_of_runs(monkeypatch, machine):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    (finding,) = doctor.check_cache()
    updated = {}
    monkeypatch.setattr(jax.config, "update", updated.__setitem__)
    monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", None, raising=False)
    compilation_cache.enable()
    assert finding.value.startswith(updated["jax_compilation_cache_dir"])


# --- The trainer ---------------------------------------------------------------------------------


def test_doctor_unknown_trainer_is_reported(capsys, monkeypatch):
    monkeypatch.setenv("MPT_JAX_TRAINER", "mine")
    wrong = only_wrong(capsys, "--suite=toy")
    assert "'mine'" in wrong["problem"] and wrong["mend"] == "unset MPT_JAX_TRAINER"


def test_doctor_requested_t5x_missing_is_reported(capsys, monkeypatch):
    monkeypatch.setenv("MPT_JAX_TRAINER", "t5x")
    assert "github.com/google-research/t5x" in only_wrong(capsys, "--suite=toy")["mend"]


def test_doctor_complete_t5x_is_the_trainer(capsys, machine, monkeypatch):
    monkeypatch.syspath_prepend(str(write_t5x(machine / "a", train="import json\nimport jax\n")))
    code, found = findings(capsys, "--suite=toy")
    assert code == 0 and found["trainer"]["value"] == f"T5X, from {machine / 'a' / 't5x'}"
    monkeypatch.setenv("MPT_JAX_TRAINER", "own")
    assert findings(capsys, "--suite=toy")[1]["trainer"]["value"].startswith("mpt_jax ")


def test_doctor_t5x_missing_packages_are_reported(capsys, machine, monkeypatch):
    """The script imports a T5X module, which imports a sister package with a missing dependency."""
    files = {
        "train": "from t5x import utils\n",
        "utils": "try:\n  import absent_but_tried\nexcept ImportError: pass\nimport airio.core\n",
        "infer": "def f():\n  import absent_in_a_function\n",
        "eval": "if __name__ == '__main__':\n  import absent_fiddle\n",
        "export": "import absent_and_unused\n",
    }
    (write_t5x(machine / "a", **files) / "airio").mkdir()
    (machine / "a" / "airio" / "__init__.py").write_text("")
    (machine / "a" / "airio" / "core.py").write_text("import os, absent_grain.python as grain\n")
    monkeypatch.syspath_prepend(str(machine / "a"))
    wrong = only_wrong(capsys, "--suite=toy")
    assert wrong["problem"].startswith("T5X needs absent_fiddle, absent_grain, which cannot be")
    assert "tpu/requirements-t5x.txt" in wrong["mend"]


def test_doctor_t5x_missing_scripts_are_reported(capsys, machine, monkeypatch):
    folder = write_t5x(machine / "a")
    (folder / "t5x" / "infer.py").unlink()
    monkeypatch.syspath_prepend(str(folder))
    problem = only_wrong(capsys, "--suite=toy")["problem"]
    assert problem == f"The T5X in {folder / 't5x'} has no infer.py."


def test_doctor_two_t5x_are_reported(capsys, machine, monkeypatch):
    for name in ("b", "a", "a"):  # one is on the path twice and counts once
        monkeypatch.setattr(sys, "path", [str(write_t5x(machine / name)), *sys.path])
    wrong = only_wrong(capsys, "--suite=toy")
    assert wrong["name"] == "other T5X" and wrong["value"] == str(machine / "b" / "t5x")


# --- Folders and buckets -------------------------------------------------------------------------


def test_doctor_unwritable_root_is_reported(capsys, machine, monkeypatch):
    (machine / "file").write_text("")
    monkeypatch.setenv("MPT_JAX_ROOT", str(machine / "file"))
    wrong = only_wrong(capsys, "--suite=toy")
    assert wrong["name"] == "MPT_JAX_ROOT" and "Cannot write to" in wrong["problem"]
    assert "MPT_JAX_ROOT" in wrong["mend"]


def test_doctor_unreadable_folders_count_as_absent(machine, monkeypatch):
    stat, closed = os.stat, machine / "closed"

    def refusing(path, *args, **kwargs):
        if str(path).startswith(f"{closed}/"):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", refusing)
    assert doctor.check_folder("MPT_JAX_ROOT", f"{closed}/a/b", "mend").name == "MPT_JAX_ROOT"
    assert all(finding.problem for finding in doctor.check_backbone(f"{closed}/a"))
    absent = [finding for finding in doctor.check_data(f"{closed}/a") if finding.value == "absent"]
    assert len(absent) == len(doctor.SOURCES)


def test_check_folder_full_disk_is_reported(machine, monkeypatch):
    monkeypatch.setattr(doctor, "MIN_FREE", 2**80)
    finding = doctor.check_folder("MPT_JAX_ROOT", str(machine), "mend")
    problem = f"Less than 1 GiB is free in {machine}."
    assert (finding.problem, finding.mend) == (problem, "mend")


@pytest.mark.parametrize("credentials", [True, False])
def test_doctor_unwritable_bucket_is_reported(credentials, capsys, machine, monkeypatch):
    monkeypatch.setenv("MPT_JAX_ROOT", "gs://bucket/runs")
    monkeypatch.setattr(doctor, "_WRITE", "import sys; sys.exit('no such bucket: ' + sys.argv[1])")
    if credentials:
        (folder := machine / "home" / ".config" / "gcloud").mkdir(parents=True)
        (folder / "application_default_credentials.json").write_text("{}")
    wrong = only_wrong(capsys, "--suite=toy")
    assert wrong["problem"] == "Cannot write to gs://bucket/runs: no such bucket: gs://bucket/runs"
    assert ("gcloud auth application-default login" in wrong["mend"]) != credentials


def test_check_root_silent_bucket_times_out(monkeypatch):
    monkeypatch.setattr(doctor, "_WRITE", "import time; time.sleep(600)")
    _, finding = doctor.check_root("gs://b/x", doctor.Probe(doctor._WRITE), seconds=0.5)
    assert finding.problem == "Cannot write to gs://b/x: no answer within 0.5 s."


def test_check_root_bucket_probe_leaves_no_file(machine):
    """A folder stands in for the bucket: the same path library writes both."""
    question = doctor.Probe(doctor._WRITE, str(machine), "scratch")
    *_, finding = doctor.check_root(str(machine), question, seconds=120.0)
    assert finding.value == f"{machine}, written" and not finding.problem
    assert not list(machine.glob("scratch"))


# --- Data and backbone ---------------------------------------------------------------------------


def test_doctor_absent_data_and_backbone_give_commands(capsys, machine):
    code, found = findings(capsys, f"--tfds_data_dir={machine / 'my data'}")
    wrong = {name: finding for name, finding in found.items() if finding["problem"]}
    assert code == 1 and set(wrong) == {*doctor.SOURCES, "backbone"}
    command = shlex.split(wrong["squad/v1.1:3.0.0"]["mend"])
    assert command == ["tfds", "build", "squad/v1.1:3.0.0", "--data_dir", f"{machine}/my data"]
    backbone = f"{machine}/root/backbones/t5-base"
    assert wrong["backbone"]["mend"].endswith(f"google-t5/t5-base --local-dir {backbone}")
    assert wrong["backbone"]["problem"] == (
        f"Missing from {backbone}: config.json, spiece.model, model.safetensors."
    )
    assert doctor.main([f"--tfds_data_dir={machine}", "--timeout=60"]) == 1
    assert "7 problems found. Stages of gin/tiny.gin need no data" in capsys.readouterr().out


def test_check_data_complete_data_may_be_read_only(machine, monkeypatch):
    for source in doctor.SOURCES:
        name, _, version = source.partition(":")
        (folder := machine / name / version).mkdir(parents=True)
        (folder / "dataset_info.json").write_text("{}")
    monkeypatch.setattr(doctor, "MIN_FREE", 2**80)
    assert not any(finding.problem for finding in doctor.check_data(str(machine)))
    (machine / "squad" / "v1.1" / "3.0.0" / "dataset_info.json").unlink()
    wrong = [finding.name for finding in doctor.check_data(str(machine)) if finding.problem]
    assert wrong == ["TFDS_DATA_DIR", "squad/v1.1:3.0.0"]


# --- Devices and processes -----------------------------------------------------------------------


def test_check_devices_silent_device_times_out_and_is_killed(monkeypatch):
    question = doctor.Probe("import time; time.sleep(600)")
    started = time.monotonic()
    finding, _ = doctor.check_devices(question, seconds=0.5)
    assert time.monotonic() - started < 10
    assert "did not answer within 0.5 s" in finding.problem and "fuser" in finding.mend
    assert question._child.returncode == -signal.SIGKILL


def test_doctor_unusable_device_is_reported(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_DEVICES", "raise RuntimeError('TPU is in use')")
    wrong = only_wrong(capsys, "--suite=toy")
    assert wrong["problem"] == "JAX finds no device: RuntimeError: TPU is in use"


def test_doctor_incomplete_job_address_is_reported(capsys, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1")
    assert "joins others" in findings(capsys, "--suite=toy")[1]["processes"]["value"]
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    assert "must be set together" in only_wrong(capsys, "--suite=toy")["problem"]


@pytest.mark.slow
def test_doctor_command_lists_jax_devices(tmp_path):
    arguments = ("--suite=toy", "--json", "--timeout=120")
    variables = {"MPT_JAX_ROOT": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    child = run_command("doctor", *arguments, check=False, **variables)
    devices = [f for f in json.loads(child.stdout)["findings"] if f["name"] == "devices"]
    assert devices[0]["value"].startswith("1 x cpu (cpu)")


# --- Names in the current folder -----------------------------------------------------------------


def test_doctor_names_a_tasks_module_of_the_user(capsys, machine, monkeypatch):
    (machine / "tasks.py").write_text("")
    monkeypatch.chdir(machine)
    code, found = findings(capsys, "--suite=toy")
    assert code == 0, "a module tasks of the user works"
    value = found["module tasks"]["value"]
    assert value.startswith(str(machine / "tasks.py")) and "mpt_jax.tasks.glue" in value


@pytest.mark.parametrize("name", ["mpt_jax/__init__.py", "t5x.py"])
def test_doctor_reports_what_shadows_a_package(name, capsys, machine, monkeypatch):
    path = machine / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    path = path.parent if path.stem == "__init__" else path
    monkeypatch.chdir(machine)
    wrong = only_wrong(capsys, "--suite=toy")
    assert str(path) in wrong["problem"] and wrong["mend"].startswith(f"rename {path}")


def test_shadows_leaves_out_this_library_and_t5x(machine):
    assert not list(shadows.find(ROOT))
    write_t5x(machine)
    assert not list(shadows.find(machine))
    (machine / "tasks").mkdir()
    assert list(shadows.find(machine)) == [("tasks", machine / "tasks")]


@pytest.mark.parametrize("name", ["t5x", "mpt_jax"])
def test_shadows_leaves_out_a_clone_below_the_folder(name, machine):
    """Python imports a folder without an __init__.py last, so ours is found."""
    (machine / name / name).mkdir(parents=True)
    script = f"import sys; sys.path.insert(0, '.'); import {name}; print({name}.__file__)"
    printed = run_script(script, cwd=machine, PYTHONPATH=str(ROOT), MPT_JAX_TRAINER="own")
    assert printed.startswith(str(ROOT))
    assert not list(shadows.find(machine))


def test_shadows_finds_modules_on_the_python_path(machine, monkeypatch):
    (machine / "project").mkdir()
    (machine / "project" / "tasks.py").touch()
    monkeypatch.syspath_prepend(machine / "project")
    assert list(shadows.find(machine)) == [("tasks", machine / "project" / "tasks.py")]


def test_doctor_says_how_t5x_finds_the_gin_files(capsys, machine, monkeypatch):
    _, found = findings(capsys, "--suite=toy")
    assert found["gin files"]["value"] == str(ROOT / "gin")
    monkeypatch.syspath_prepend(write_t5x(machine / "clone"))
    monkeypatch.chdir(machine)
    _, found = findings(capsys, "--suite=toy")
    assert found["gin files"]["value"].endswith(f"--gin_search_paths={ROOT}")
