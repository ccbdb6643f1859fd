"""Map from old names to current ones, to read files of early versions.

Version 0.1 wrote the old names into checkpoints, artifacts and plans before its modules became
packages. Those files can still be read. Nothing writes the old names.
"""

from __future__ import annotations

import os
import re
from typing import Any

from etils import epath

# Output folders of stages.
FOLDERS = {"artefact": "artifact", "artefacts": "artifacts"}
# Keys in the configurations of fingerprints, artifacts and prompt methods.
KEYS = {
    "artefact_sha256": "artifact_sha256",
    "normalise": "normalize",
    "reparametrise": "reparameterize",
}
# Words in the gin bindings of planned stages.
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
    """Returns a JSON value with old keys replaced by current ones at every depth."""
    if isinstance(value, dict):
        return {KEYS.get(key, key): current_keys(inner) for key, inner in value.items()}
    return [current_keys(inner) for inner in value] if isinstance(value, list) else value


def current_text(text: str) -> str:
    """Returns a text with old words replaced by current ones."""
    return _WORD.sub(lambda match: WORDS[match[1]], text)


def existing_folder(path: str | os.PathLike[str]) -> epath.Path:
    """Returns the path, or the same path under its old name if only that exists."""
    new = epath.Path(path)
    old_names = {new_name: old_name for old_name, new_name in FOLDERS.items()}
    parts = [old_names.get(part, part) for part in new.parts[-2:]]
    old = new.parent.parent.joinpath(*parts) if len(new.parts) > 2 else epath.Path(*parts)
    return old if not new.exists() and old.exists() else new
