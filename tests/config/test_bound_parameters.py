"""Every parameter that a shipped gin file binds is read, or refuses other values.

Two oracles. The first reads the source of the library: a parameter of a function must be loaded in
its body, and a field of a class must be loaded somewhere outside the constructor of the class. The
second (slow) runs one stage and records which fields are read by code outside the class's own
constructor, so that a field does not count as read because another class has one of the same name.
"""

from __future__ import annotations

import ast
import collections
import dataclasses
import functools
import inspect
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpt_jax.config import gin_check, gin_utils
from tests.fixtures import gin_files

LIBRARY = gin_files.ROOT / "mpt_jax"
CONSTRUCTORS = {"__init__", "__post_init__"}
ENTRIES = tuple(gin_utils.ENTRY_POINTS.values())

# Parameters that our own trainer does not read, with the reason.
UNREAD = {
    "own_save_hooks.model_dir": "T5X's trainer writes artifacts in hooks; train() takes MODEL_DIR.",
}


def commands() -> dict[str, tuple[list[str], str]]:
    """The files and the entry point of each command that uses a shipped gin file.

    A stage is a command of its own; a file of gin/runs, gin/methods or gin/ablations has the
    command in its header, unless a stage includes it.
    """
    found = {}
    for path in sorted((gin_files.ROOT / "gin").rglob("*.gin")):
        name = str(path.relative_to(gin_files.ROOT))
        entry = path.stem if path.stem in ("eval", "infer") else "train"
        if path.parent.name == "gin" and path.stem not in ("tiny", "tiny_vision"):
            method = [] if entry == "train" else ["gin/methods/mpt.gin"]
            found[name] = ([name, *method], entry)
        elif given := re.findall(r"^#.*?--gin_file=(?:.*\\\n#)*.*", path.read_text(), re.MULTILINE):
            files = re.findall(r"--gin_file=(\S+)", given[0])
            first = Path(files[0]).stem
            found[name] = (files, first if first in ("eval", "infer") else entry)
    found["gin/tiny.gin"] = ([gin_files.SOURCE, "gin/tiny.gin"], "train")
    return found


@functools.cache
def loads() -> dict[str, set[tuple[str, str]]]:
    """{attribute: the (class, function) pairs that load it}, over the source of the library."""
    found: dict[str, set[tuple[str, str]]] = collections.defaultdict(set)

    def visit(node: ast.AST, owner: str, function: str) -> None:
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            found[node.attr].add((owner, function))
        if isinstance(node, ast.ClassDef):
            owner = node.name
        if isinstance(node, ast.FunctionDef) and not function:
            function = node.name
        for child in ast.iter_child_nodes(node):
            visit(child, owner, "" if isinstance(node, ast.ClassDef) else function)

    for path in LIBRARY.rglob("*.py"):
        visit(ast.parse(path.read_text()), "", "")
    return found


def is_read(function: Callable[..., Any], parameter: str) -> bool:
    """Whether the library reads a parameter, or refuses an unknown value of it."""
    if dataclasses.is_dataclass(function):
        return attribute_is_read(function, parameter) or is_refused(function, parameter)
    known = inspect.signature(function).parameters
    if parameter not in known:  # one of **overrides
        (parameter,) = [name for name, x in known.items() if x.kind is x.VAR_KEYWORD]
    body = function.__init__ if isinstance(function, type) else inspect.unwrap(function)
    tree = ast.parse(textwrap.dedent(inspect.getsource(body)))
    kept = {
        node.targets[0].attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Name)
        and node.value.id == parameter
        and isinstance(node.targets[0], ast.Attribute)
    }
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == parameter]
    used = sum(isinstance(node.ctx, ast.Load) for node in names) > len(kept)
    return used or any(attribute_is_read(function, name) for name in kept)


def attribute_is_read(cls: Any, name: str) -> bool:
    own = {base.__name__ for base in cls.__mro__}
    return any(owner not in own or at not in CONSTRUCTORS for owner, at in loads()[name])


def is_refused(cls: Any, name: str) -> bool:
    """Whether a class that can be built from its defaults raises for an unknown value."""
    try:
        cls(**{name: "no such value"})
    except ValueError:
        return True
    except TypeError:
        return False
    return False


def name_of(bound: gin_check.BoundValue) -> str:
    return f"{bound.function.__name__}.{bound.parameter}"


@pytest.mark.parametrize("name", commands())
def test_bound_parameters_are_read_or_refused(own_trainer, name):
    files, entry = commands()[name]
    gin_files.parse(files, [], entry)
    bound = list(gin_check.bound_values(ENTRIES))
    ours = [x for x in bound if x.function.__module__.partition(".")[0] in ("mpt_jax", "__main__")]
    assert len(ours) > 40  # a stage binds some 100 parameters
    unread = {name_of(x) for x in ours if not is_read(x.function, x.parameter)}
    assert unread <= UNREAD.keys()


@dataclasses.dataclass
class Settings:
    """A class with a field that nothing reads."""

    task_feature_lengths: int = 1
    field_of_no_reader: int = 2


class Kept:
    def __init__(self, read: int, ignored: int, stored_for_no_reader: int):
        del ignored
        self.total = read + 1
        self._stored_for_no_reader = stored_for_no_reader


def test_unread_parameters_are_found():
    assert is_read(Settings, "task_feature_lengths") and is_read(Kept, "read")
    assert not is_read(Settings, "field_of_no_reader")
    assert not is_read(Kept, "ignored") and not is_read(Kept, "stored_for_no_reader")


# --- Fields that one run reads --------------------------------------------------------------------

# Fields that a run of gin/mpt_source.gin reads only in other cases, with the case.
OTHER_CASES = {
    "Origins.backbone_command": "shown if the backbone is missing",
    "Origins.teachers_command": "shown if a teacher is missing",
    "Origins.artifact_command": "shown if the artifact is missing",
    "MPT.start_from": "with an INITIAL_ARTIFACT, as in gin/mpt_target.gin",
    "MPT.average_of": "with an INITIAL_ARTIFACT, as in gin/mpt_target.gin",
    "PjitPartitioner.model_parallel_submesh": "refused",
    "PjitPartitioner.num_partitions": "its constructor makes the mesh of it",
    "SaveCheckpointConfig.dtype": "refused",
    "SelectBest.model_dir": "its constructor opens the folder",
    "SaveCheckpointConfig.state_transformation_fns": "refused",
}


def recorded(classes: list[Any], run: Callable[[], Any], monkeypatch) -> set[str]:
    """Returns the fields, as class.field, that `run` reads outside constructors of the class and
    outside what dataclasses generate."""
    found: set[str] = set()

    def patch(cls: Any) -> None:
        names = {field.name for field in dataclasses.fields(cls)}
        plain = cls.__getattribute__

        def get(self: Any, name: str) -> Any:
            if name in names:
                code = sys._getframe(1).f_code
                generated = code.co_filename.startswith("<") or "dataclasses" in code.co_filename
                if not generated and code.co_name not in CONSTRUCTORS:
                    found.add(f"{cls.__name__}.{name}")
            return plain(self, name)

        monkeypatch.setattr(cls, "__getattribute__", get)

    for cls in classes:
        patch(cls)
    run()
    return found


@pytest.mark.slow
def test_source_stage_reads_every_bound_field(own_trainer, tmp_path, monkeypatch):
    files = [gin_files.SOURCE, "gin/tiny.gin"]
    bindings = ["TRAIN_STEPS = 2", "EVAL_PERIOD = 2", "EVAL_STEPS = 1", "STATS_PERIOD = 1"]
    bindings += ["BATCH_SIZE = 12", "EVAL_BATCH_SIZE = 12", "EVALUATOR_NUM_EXAMPLES = 12"]
    bindings += [f"MODEL_DIR = {str(tmp_path)!r}"]
    gin_files.parse(files, bindings)
    fields = [x for x in gin_check.bound_values(ENTRIES) if dataclasses.is_dataclass(x.function)]
    classes = list(dict.fromkeys(x.function for x in fields))
    read = recorded(classes, lambda: gin_utils.run_stage(files, bindings), monkeypatch)
    unread = {name_of(x) for x in fields} - read - OTHER_CASES.keys()
    assert not unread
