"""Import alias `tasks` for `mpt_jax.tasks`; a user's `tasks.py` always wins."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from mpt_jax.data import task_lookup
from tests.fixtures.processes import ROOT, run_python, run_script


def run(code: str, folder: Path) -> str:
    """Standard output of a script that runs in a folder."""
    script = f"import sys; sys.path.insert(0, '')\n{code}"
    return run_script(script, cwd=folder, PYTHONPATH=str(ROOT)).strip()


SAME = """
import mpt_jax.data
import mpt_jax.tasks.splits as new
import tasks.splits as old
import tasks
print(old is new, tasks.splits is new, new.__spec__.name)
"""


def test_tasks_alias_free_name_imports_same_modules(tmp_path):
    assert run(SAME, tmp_path) == "True True mpt_jax.tasks.splits"


@pytest.mark.parametrize("where", ["tasks.py", "tasks/__init__.py"])
def test_tasks_alias_user_tasks_module_wins(where, tmp_path):
    path = tmp_path / where
    path.parent.mkdir(exist_ok=True)
    path.write_text("MINE = True\n")
    code = "import mpt_jax.data, tasks, mpt_jax.tasks.toy; print(tasks.MINE)"
    assert run(code, tmp_path) == "True"
    code = "import mpt_jax.data\ntry: import tasks.splits\nexcept ImportError as e: print(e.name)"
    assert run(code, tmp_path) == "tasks.splits"


def test_tasks_alias_unknown_suite_raises_import_error(tmp_path):
    code = "import mpt_jax.data\ntry: import tasks.no\nexcept ImportError as e: print(e.name)"
    assert run(code, tmp_path) == "tasks.no"


@pytest.mark.slow  # a whole run
def test_tasks_alias_train_beside_users_tasks_module(tmp_path):
    """The ten lines of the README, in a module `tasks`, as T5X's own example calls it."""
    readme = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n(from mpt_jax.tasks import files\n.*?)```", readme, re.S)
    (tmp_path / "tasks.py").write_text(code)
    rows = [("good", "positive"), ("bad", "negative")] * 12
    lines = [f"the film {number} was {word} .,{label}" for number, (word, label) in enumerate(rows)]
    (tmp_path / "reviews.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    run_python(
        *("-m", "t5x.train", "--gin_file=gin/mpt_target.gin", "--gin_file=gin/tiny.gin"),
        *("--gin.TASK_MODULES=['tasks']", "--gin.TARGET_TASKS=['reviews']"),
        *("--gin.TRAIN_STEPS=2", "--gin.BATCH_SIZE=4", "--gin.ON_OVERLONG='truncate'"),
        cwd=tmp_path,
        PYTHONPATH=str(ROOT),
        MPT_JAX_ROOT=str(tmp_path / "root"),
        MPT_JAX_TRAINER="own",
    )
    scores = tmp_path / "root/tiny/mpt_target/inference_eval/reviews-metrics.jsonl"
    assert "accuracy" in json.loads(scores.read_text().splitlines()[-1])


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("tasks", "from tasks import jsonl"),
        ("tasks", "from tasks.glue import ROWS"),
        ("alias_old", "from tasks import jsonl"),
        ("alias_old", "from mpt_jax.tasks import jsonl"),
    ],
)
def test_import_suites_module_with_an_old_import_error_names_the_new_one(
    module, line, tmp_path, monkeypatch
):
    (tmp_path / f"{module}.py").write_text(f"{line}\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "tasks"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ValueError, match=f"suite {module} .*`from mpt_jax.tasks import files`"):
        task_lookup.import_suites([module])


def test_import_suites_module_with_another_error_raises_it(tmp_path, monkeypatch):
    (tmp_path / "alias_other.py").write_text("from json import nothing\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="nothing"):
        task_lookup.import_suites(["alias_other"])
