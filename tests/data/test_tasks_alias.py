"""`tasks` answers for `mpt_jax.tasks` where it is free, and a user's own `tasks.py` always wins."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fixtures.processes import ROOT, run_script


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


def test_tasks_is_the_package_itself_if_the_name_is_free(tmp_path):
    assert run(SAME, tmp_path) == "True True mpt_jax.tasks.splits"


@pytest.mark.parametrize("where", ["tasks.py", "tasks/__init__.py"])
def test_a_users_own_tasks_wins_and_breaks_nothing(where, tmp_path):
    path = tmp_path / where
    path.parent.mkdir(exist_ok=True)
    path.write_text("MINE = True\n")
    code = "import mpt_jax.data, tasks, mpt_jax.tasks.toy; print(tasks.MINE)"
    assert run(code, tmp_path) == "True"
    code = "import mpt_jax.data\ntry: import tasks.splits\nexcept ImportError as e: print(e.name)"
    assert run(code, tmp_path) == "tasks.splits"


def test_a_suite_that_was_never_there_is_missing_as_usual(tmp_path):
    code = "import mpt_jax.data\ntry: import tasks.no\nexcept ImportError as e: print(e.name)"
    assert run(code, tmp_path) == "tasks.no"
