"""Choice of the module `t5x`: a real T5X if one can be imported, else the fallback.

Each case runs in a separate process, since a process decides once. A folder with the files that
identify T5X stands in for T5X.
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
# An editable install that adds a finder.
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
def test_import_t5x_without_t5x_finds_fallback(tmp_path):
    assert answer(WHO, ROOT, cwd=tmp_path) == "own"


def test_import_t5x_any_path_order_finds_real_t5x(real, tmp_path):
    assert answer(WHO, real, ROOT, cwd=tmp_path) == "real"
    assert answer(WHO, ROOT, real, cwd=tmp_path) == "real"


def test_import_t5x_in_working_directory_finds_real_t5x(real):
    assert answer(WHO, ROOT, cwd=real) == "real"


def test_import_t5x_editable_install_finds_real_t5x(real, tmp_path):
    code = FINDER.format(folder=str(real / "t5x")) + WHO
    assert answer(code, ROOT, cwd=tmp_path) == "real"


def test_import_t5x_submodules_come_from_real_t5x(real, tmp_path):
    code = "from t5x import models; import t5x.train_state; print(models.MARK)"
    assert answer(code, ROOT, real, cwd=tmp_path) == "real models"


@pytest.mark.parametrize("files", [(), ("__init__.py",)])
def test_import_t5x_other_folder_named_t5x_is_skipped(files, real, tmp_path):
    other = tmp_path / "other" / "t5x"
    other.mkdir(parents=True)
    for name in files:
        (other / name).write_text("MARK = 'other'\n")
    assert answer(WHO, ROOT, other.parent, real, cwd=tmp_path) == "real"


def test_trainer_variable_selects_trainer(real, tmp_path):
    assert answer(WHO, ROOT, real, cwd=tmp_path, MPT_JAX_TRAINER="own") == "own"
    assert answer(WHO, ROOT, real, cwd=tmp_path, MPT_JAX_TRAINER="t5x") == "real"
    child = run(WHO, ROOT, real, cwd=tmp_path, MPT_JAX_TRAINER="mine")
    assert "'mine'" in child.stderr and "MPT_JAX_TRAINER" in child.stderr


def test_trainer_variable_t5x_missing_says_where_to_get_it(tmp_path):
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
def test_fallback_unknown_submodule_says_what_to_install(statement, tmp_path):
    child = run(statement, ROOT, cwd=tmp_path, MPT_JAX_TRAINER="own")
    assert child.returncode
    assert "part of T5X, but this process uses the fallback" in child.stderr
    assert "github.com/google-research/t5x" in child.stderr


def test_real_t5x_finds_shipped_gin_files_from_any_folder(real, tmp_path):
    (real / "t5x" / "train.py").write_text(
        "import gin\n"
        "gin.parse_config_file('gin/runs/tasks.gin')\n"
        "print(gin.query_parameter('%TARGET_TASKS'))\n"
    )
    code = "import runpy; runpy.run_module('t5x.train', run_name='__main__')"
    assert answer(code, ROOT, real, cwd=tmp_path) == "['boolq']"


def test_install_fallback_overrides_real_t5x(real, tmp_path):
    code = f"from mpt_jax.config import trainer_choice; trainer_choice.install_fallback(); {WHO}"
    assert answer(code, ROOT, real, cwd=tmp_path) == "own"


def test_install_fallback_after_real_t5x_raises(real, tmp_path):
    code = "import t5x; from mpt_jax.config import trainer_choice as c; c.install_fallback()"
    child = run(code, ROOT, real, cwd=tmp_path)
    assert child.returncode and "T5X is already loaded from" in child.stderr


@pytest.mark.parametrize("script", ["train", "eval", "infer"])
def test_fallback_scripts_are_found_by_python_m(script, tmp_path):
    code = f"import importlib.util; print(importlib.util.find_spec('t5x.{script}').origin)"
    found = answer(code, ROOT, cwd=tmp_path, MPT_JAX_TRAINER="own")
    assert found == str(ROOT / "mpt_jax" / "t5x_compat" / "fallback" / f"{script}.py")


def test_train_command_first_line_names_trainer(real, tmp_path):
    """The line comes before any slow or noisy import."""
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


def test_fallback_is_marked_and_not_an_installed_package(tmp_path):
    """Other libraries' checks for an installed T5X find none."""
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
