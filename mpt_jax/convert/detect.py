"""Detection of the format of backbones and prompts, from their content rather than their name."""

from __future__ import annotations

from etils import epath

from mpt_jax.backbones.clip import hf_config, open_clip_config
from mpt_jax.convert import peft
from mpt_jax.convert.t5x import only_checkpoint
from mpt_jax.runtime.files import read_json

HF, T5X, ORBAX, OPEN_CLIP = "hf", "t5x", "orbax", "open-clip"
ARTIFACT, PEFT, PEFT_FOLDED = "artifact", "peft", "peft-folded"
NPY, SAFETENSORS = "npy", "safetensors"
T5_FORMATS = (HF, T5X, ORBAX)
CLIP_FORMATS = (HF, OPEN_CLIP)
BACKBONES = (*T5_FORMATS, OPEN_CLIP)
PROMPTS = (ARTIFACT, PEFT, PEFT_FOLDED, NPY, SAFETENSORS)
# The default of --to, except that a CLIP in a Hugging Face folder is written for open_clip.
USUAL_TARGET = {
    HF: T5X,
    T5X: HF,
    OPEN_CLIP: HF,
    ARTIFACT: PEFT,
    PEFT: ARTIFACT,
    NPY: ARTIFACT,
    SAFETENSORS: ARTIFACT,
}

_NUMPY_MAGIC = b"\x93NUMPY"


def recognize(path: epath.Path) -> str:
    """Returns the format of a path's content; `t5x` for both T5X's own format and Orbax.

    Raises:
        FileNotFoundError: the path does not exist or has no known format.
    """
    path = only_checkpoint(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. Check the path.")
    if not path.is_dir():
        return _of_file(path)
    names = {child.name for child in path.iterdir()}
    if {"config.json", "prompts.safetensors"} <= names:
        return ARTIFACT
    if peft.CONFIG in names:
        return PEFT
    if "config.json" in names:
        return HF
    if open_clip_config.CONFIG in names:
        return OPEN_CLIP
    if names & {"checkpoint", "state", "_METADATA"}:
        return T5X
    if adapters(path):
        return PEFT
    steps = sorted(name for name in names if name.startswith("checkpoint_"))
    found = ", ".join(sorted(names)[:8]) or "no files"
    hint = "Check the path."
    if steps:
        hint = f"Use the path of one of the checkpoints in it: {', '.join(steps)}."
    raise FileNotFoundError(
        f"{path} is not a Hugging Face or open_clip folder, T5X checkpoint, prompt artifact or "
        f"PEFT adapter; it holds {found}. {hint}"
    )


def is_clip(path: epath.Path) -> bool:
    """Whether a folder holds a CLIP or a plain ViT, by its configuration file.

    Raises:
        ValueError: its `config.json` is not a JSON object.
    """
    config = path / hf_config.CONFIG
    if config.exists():
        return read_json(config).get("model_type") in list(hf_config.MODEL_TYPES)
    return (path / open_clip_config.CONFIG).exists()


def _of_file(path: epath.Path) -> str:
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(_NUMPY_MAGIC):
        return NPY
    # Safetensors starts with a length of eight bytes, then JSON; msgpack starts with a map.
    return SAFETENSORS if start[8:] == b"{" else T5X


def adapters(path: epath.Path) -> list[epath.Path]:
    """Returns the PEFT adapter at a path, or all adapters in a folder, sorted by name; [] if there
    are none."""
    if (path / peft.CONFIG).exists():
        return [path]
    return sorted(child for child in path.iterdir() if (child / peft.CONFIG).exists())
