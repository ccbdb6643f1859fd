"""Default paths: one ROOT holds the inputs and outputs of all jobs.

    $MPT_JAX_ROOT, else ./runs
        backbones/<name>/...        pretrained weights and vocabularies
        <stage>/                    MODEL_DIR of a stage; its artifact is in <stage>/artifact

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
    """Returns the folder or bucket that contains all default paths."""
    return os.environ.get(ROOT_VARIABLE) or os.path.join(os.curdir, "runs")


def under(*, base: str, name: str, shared_filesystem: bool = False) -> str:
    """Returns `base/name`.

    Args:
        base: a local folder, or a remote prefix such as `gs://bucket/project`.
        name: a path below it.
        shared_filesystem: whether every host sees the same files under a local `base`.

    Raises:
        ValueError: an argument is empty, or each of several hosts would use a separate folder.
    """
    if not base or not name:
        raise ValueError(
            f"Cannot build a path from base {base!r} and name {name!r}. Set ROOT, or the bindings "
            "paths.under.base and paths.under.name, to non-empty strings."
        )
    local = "://" not in base
    if local and not shared_filesystem and jax.process_count() > 1:
        raise ValueError(
            f"ROOT is {base!r}, a local folder, but this job has {jax.process_count()} hosts and "
            f"each would use its own folder. Set {ROOT_VARIABLE} (or --gin.ROOT) to a storage "
            "bucket, or bind paths.under.shared_filesystem = True if all hosts mount the same "
            "folder."
        )
    return os.path.join(base, name)


def download_command(*, repository: str, folder: str) -> str:
    """Returns a command that downloads a Hugging Face model into a folder, to show in errors."""
    if "://" not in folder:
        return f"hf download {repository} --local-dir {shlex.quote(folder)}"
    name = repository.rpartition("/")[2]
    return f"hf download {repository} --local-dir {name}, and copy that folder to {folder}"


def shipped(*, name: str) -> str:
    """Returns the path of a file or folder shipped with the toy suite.

    It exists in a clone and in an installed wheel.

    Raises:
        FileNotFoundError: no such file is shipped; the message lists the shipped files.
    """
    if not (SHIPPED / name).exists():
        names = ", ".join(sorted(path.name for path in SHIPPED.glob("*")))
        raise FileNotFoundError(f"No file {name!r} is shipped in {SHIPPED}. Choose from: {names}.")
    return str(SHIPPED / name)


def own_or_shipped(*, own: str, name: str) -> str:
    """Returns the path of an earlier stage's output or, if there is none, of the shipped copy.

    Logs a line if it returns the shipped copy. If neither exists, returns the path of the output.

    Args:
        own: the path of the earlier stage's output.
        name: the name of the shipped file or folder.
    """
    own = os.fspath(existing_folder(own))  # earlier versions used another name
    if epath.Path(own).exists() or not (SHIPPED / name).exists():
        return own
    logging.info("%s does not exist yet; using the shipped %s.", own, SHIPPED / name)
    return str(SHIPPED / name)
