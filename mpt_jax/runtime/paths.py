"""One ROOT under which every run finds its inputs and leaves its outputs.

    $MPT_JAX_ROOT, else ./runs
        backbones/<name>/...        pretrained weights and vocabularies
        <stage>/                    MODEL_DIR of a stage; <stage>/artifact is what it hands on

Gin files build every path from it (`paths.under`), so one variable moves a whole project.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import jax
from absl import logging
from etils import epath

from mpt_jax.core.old_names import existing_folder

ROOT_VARIABLE = "MPT_JAX_ROOT"
SHIPPED = Path(__file__).parents[1] / "tasks" / "data"


def root() -> str:
    """The folder or bucket that all default paths lie under."""
    return os.environ.get(ROOT_VARIABLE) or os.path.join(os.curdir, "runs")


def under(*, base: str, name: str, shared_filesystem: bool = False) -> str:
    """`base/name`.

    Args:
        base: a local folder, or a remote prefix such as `gs://bucket/project`.
        name: a path below it.
        shared_filesystem: says that every host sees the same files under a local `base`.

    Raises:
        ValueError: several hosts would each use a folder of their own.
    """
    if not base or not name:
        raise ValueError(f"Cannot build a path from base {base!r} and name {name!r}.")
    local = "://" not in base
    if local and not shared_filesystem and jax.process_count() > 1:
        raise ValueError(
            f"ROOT is {base!r}, a local folder, and this job has {jax.process_count()} hosts: each "
            f"would read and write its own. Set {ROOT_VARIABLE} (or --gin.ROOT) to a bucket, or "
            "bind paths.under.shared_filesystem = True where all hosts mount the same folder."
        )
    return os.path.join(base, name)


def download_command(*, repository: str, folder: str) -> str:
    """How to get a model of the Hugging Face hub into a folder, for messages."""
    if "://" not in folder:
        return f"hf download {repository} --local-dir {shlex.quote(folder)}"
    here = repository.rpartition("/")[2]
    return f"hf download {repository} --local-dir {here}, and copy that folder to {folder}"


def shipped(*, name: str) -> str:
    """A file or folder that travels with the toy suite, in a clone or an installed wheel.

    Raises:
        FileNotFoundError: no such file is shipped; lists what is.
    """
    if not (SHIPPED / name).exists():
        found = sorted(path.name for path in SHIPPED.glob("*"))
        raise FileNotFoundError(f"Nothing called {name!r} is shipped in {SHIPPED}; it has {found}.")
    return str(SHIPPED / name)


def own_or_shipped(*, own: str, name: str) -> str:
    """What an earlier stage left at `own`; before that stage has run, what is shipped as `name`.

    Says in the log when it is the shipped one.
    """
    own = os.fspath(existing_folder(own))  # a stage of an earlier version may have left it
    if epath.Path(own).exists() or not (SHIPPED / name).exists():
        return own
    logging.info("There is no %s yet; using the one shipped, %s.", own, SHIPPED / name)
    return str(SHIPPED / name)
