"""Who answers to `t5x`: a real T5X wherever one can be imported, else the fallback.

Each case is a process of its own, since a process decides once. A folder with T5X's telling files
stands in for T5X.
"""

from __future__ import annotations

import os
import subprocess
import textwrap
from pathlib import Path

import pytest

from mpt_jax.config import trainer_choice
from tests.fixtures.processes import ROOT, run_python

WHO = "import t5x; print('own' if getattr(t5x, '__embedded__', False) else t5x.MARK)"
# What an editable install does that brings its own finder.
FINDER = """
import importlib.util, sys
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "t5x":
            folder = {folder!r}
            return importlib.util.spec_from_file_location(
                name, folder + "/__init__.py", submodule_search_locations=[folder])
sys.meta_path.append(Finder)
"""


@pytest.fixture
def real(tmp_path: Path) -> Path:
    """A folder to put on the path, with a package that looks like T5X."""
    package = tmp_path / "real" / "t5x"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("MARK = 'real'\n")
    (package / "train_state.py").write_text("")
    (package / "models.py").write_text("MARK = 'real models'\n")
    return package.parent


def run(code: str, *path: Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    variables = {"PYTHONPATH": os.pathsep.join(map(str, path))} | variables
    return run_python("-c", textwrap.dedent(code), cwd=cwd, check=False, **variables)


def answer(code: str, *path: Path, cwd: Path, **variables: str) -> str:
    child = run(code, *path, cwd=cwd, **variables)
    assert child.returncode == 0, child.stderr
    return child.stdout.strip()


@pytest.mark.skipif(trainer_choice.find_real() is not None, reason="a real T5X is installed here")
def test_the_fallback_answers_where_there_is_no_t5x(tmp_path):
    assert answer(WHO, ROOT, cwd=tmp_path) == "own"


def test_a_real_t5x_wins_before_and_behind_the_fallback(real, tmp_path):
    assert answer(WHO, real, ROOT, cwd=tmp_path) == "real"
    assert answer(WHO, ROOT, real, cwd=tmp_path) == "real"


def test_a_real_t5x_in_the_working_directory_wins(real):
    assert answer(WHO, ROOT, cwd=real) == "real"


def test_a_real_t5x_behind_an_editable_finder_wins(real, tmp_path):
    code = FINDER.format(folder=str(real / "t5x")) + WHO
    assert answer(code, ROOT, cwd=tmp_path) == "real"


def test_submodules_come_from_the_real_t5x(real, tmp_path):
    code = "from t5x import models; import t5x.train_state; print(models.MARK)"
    assert answer(code, ROOT, real, cwd=tmp_path) == "real models"


@pytest.mark.parametrize("files", [(), ("__init__.py",)])
def test_a_folder_that_is_not_t5x_does_not_count(files, real, tmp_path):
    other = tmp_path / "other" / "t5x"
    other.mkdir(parents=True)
    for name in files:
        (other / name).write_text("MARK = 'other'\n")
    assert answer(WHO, ROOT, other.parent, real, cwd=tmp_path) == "real"


def test_the_environment_decides(real, tmp_path):
    assert answer(WHO, ROOT, real, cwd=tmp_path, MPT_JAX_TRAINER="own") == "own"
    assert answer(WHO, ROOT, real, cwd=tmp_path, MPT_JAX_TRAINER="t5x") == "real"
    child = run(WHO, ROOT, real, cwd=tmp_path, MPT_JAX_TRAINER="mine")
    assert "'mine'" in child.stderr and "MPT_JAX_TRAINER" in child.stderr


def test_asking_for_a_t5x_that_is_not_there_says_where_to_get_one(tmp_path):
    code = f"""
        import sys
        from mpt_jax.config import trainer_choice
        trainer_choice.find_real = lambda: None
        {WHO}
    """
    child = run(code, ROOT, cwd=tmp_path, MPT_JAX_TRAINER="t5x")
    assert child.returncode and "github.com/google-research/t5x" in child.stderr


@pytest.mark.parametrize(
    "statement", ["from t5x import models", "import t5x.models", "import t5x.contrib.moe"]
)
def test_what_is_not_offered_says_what_to_install(statement, tmp_path):
    child = run(statement, ROOT, cwd=tmp_path, MPT_JAX_TRAINER="own")
    assert child.returncode
    assert "part of T5X, which is not installed" in child.stderr
    assert "github.com/google-research/t5x" in child.stderr


def test_a_real_t5x_finds_our_gin_files_from_anywhere(real, tmp_path):
    (real / "t5x" / "train.py").write_text(
        "import gin\n"
        "gin.parse_config_file('gin/runs/tasks.gin')\n"
        "print(gin.query_parameter('%TARGET_TASKS'))\n"
    )
    code = "import runpy; runpy.run_module('t5x.train', run_name='__main__')"
    assert answer(code, ROOT, real, cwd=tmp_path) == "['boolq']"


def test_our_entry_points_always_choose_the_fallback(real, tmp_path):
    code = f"from mpt_jax.config import trainer_choice; trainer_choice.install_fallback(); {WHO}"
    assert answer(code, ROOT, real, cwd=tmp_path) == "own"


def test_both_trainers_in_one_process_are_refused(real, tmp_path):
    code = "import t5x; from mpt_jax.config import trainer_choice as c; c.install_fallback()"
    child = run(code, ROOT, real, cwd=tmp_path)
    assert child.returncode and "cannot hold both trainers" in child.stderr


@pytest.mark.parametrize("script", ["train", "eval", "infer"])
def test_scripts_are_found_by_python_m(script, tmp_path):
    code = f"import importlib.util; print(importlib.util.find_spec('t5x.{script}').origin)"
    found = answer(code, ROOT, cwd=tmp_path, MPT_JAX_TRAINER="own")
    assert found == str(ROOT / "mpt_jax" / "t5x_compat" / "fallback" / f"{script}.py")


def test_the_first_line_says_which_trainer_runs(real, tmp_path):
    """Before any import that is slow or noisy."""
    (real / "t5x" / "train.py").write_text("import sys; print('trains', file=sys.stderr)\n")
    lines = {}
    for trainer in ("own", "t5x"):
        path = os.pathsep.join(map(str, (ROOT, real)))
        child = run_python(
            *("-m", "t5x.train", "--gin_file=no_such_file.gin"),
            cwd=tmp_path, check=False, fresh=True, PYTHONPATH=path, MPT_JAX_TRAINER=trainer,
        )  # fmt: skip
        lines[trainer] = child.stderr.splitlines()
    assert lines["own"][0].startswith("Trainer: mpt_jax") and "T5X is not used" in lines["own"][0]
    assert any("No gin file 'no_such_file.gin'" in line for line in lines["own"])
    assert lines["t5x"][0].startswith("Trainer: T5X from") and lines["t5x"][-1] == "trains"


def test_the_fallback_is_marked_and_is_no_installed_package(tmp_path):
    """What other libraries probe for says that there is no T5X."""
    code = """
        import importlib.metadata
        import t5x
        from t5x import utils
        print(t5x.__embedded__, hasattr(t5x, "__version__"), utils.__name__)
        try:
            print(importlib.metadata.version("t5x"))
        except importlib.metadata.PackageNotFoundError:
            print("not installed")
    """
    lines = answer(code, ROOT, cwd=tmp_path, MPT_JAX_TRAINER="own").splitlines()
    assert lines == ["True False t5x.utils", "not installed"]
