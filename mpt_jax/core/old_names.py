"""Names in files that version 0.1 wrote before its modules became packages, mapped to today's.

Checkpoints, artifacts and plans of that version are read as they are. Nothing writes these names.
"""

from __future__ import annotations

import os
import re
from typing import Any

from etils import epath

# Folders that stages leave.
FOLDERS = {"artefact": "artifact", "artefacts": "artifacts"}
# Keys of configurations: of fingerprints, artifacts and prompt methods.
KEYS = {
    "artefact_sha256": "artifact_sha256",
    "normalise": "normalize",
    "reparametrise": "reparameterize",
}
# Words in the bindings of planned stages.
WORDS = {
    **FOLDERS,
    "INITIAL_ARTEFACT": "INITIAL_ARTIFACT",
    "SOURCE_ARTEFACT": "SOURCE_ARTIFACT",
    "NORMALISE": "NORMALIZE",
    "REPARAMETRISE": "REPARAMETERIZE",
    "WHOLE_BATCH": "GLOBAL_BATCH_SIZE",
    "tasks.others": "mpt_jax.tasks.mpt_others",
    "tasks.extra": "mpt_jax.tasks.extra_sources",
    **{
        f"tasks.{suite}": f"mpt_jax.tasks.{suite}"
        for suite in ("glue", "super_glue", "mrqa", "nlg", "toy")
    },
}
_WORD = re.compile(rf"(?<![\w.])({'|'.join(map(re.escape, WORDS))})(?!\w)")


def current_keys(value: Any) -> Any:
    """A JSON value with the keys that they have today, at any depth."""
    if isinstance(value, dict):
        return {KEYS.get(key, key): current_keys(inner) for key, inner in value.items()}
    return [current_keys(inner) for inner in value] if isinstance(value, list) else value


def current_text(text: str) -> str:
    """A text with the words that they are today."""
    return _WORD.sub(lambda match: WORDS[match[1]], text)


def existing_folder(path: str | os.PathLike[str]) -> epath.Path:
    """The path itself, or the same under its old name if only that exists."""
    new = epath.Path(path)
    names = {today: before for before, today in FOLDERS.items()}
    parts = [names.get(part, part) for part in new.parts[-2:]]
    old = new.parent.parent.joinpath(*parts) if len(new.parts) > 2 else epath.Path(*parts)
    return old if not new.exists() and old.exists() else new
