"""Reader and writer of PEFT prompt adapters: `adapter_config.json` and one file of tensors.

    MULTITASK_PROMPT_TUNING   prompt_embeddings [P,H], prefix_task_cols [K,P,R],
                              prefix_task_rows [K,R,H]: P*, U and V of MPT
    PROMPT_TUNING             prompt_embeddings [P,H]

For an encoder-decoder, PEFT keeps 2P rows by default (`num_transformer_submodules` is 2). MPT-JAX
inserts prompts only before the encoder's input, so it writes adapters with
`num_transformer_submodules` 1. PEFT never reads the second half of a PROMPT_TUNING adapter, so that
half is dropped when such an adapter is read. A MULTITASK_PROMPT_TUNING adapter with 2P rows is
rejected, because it is trained with the second half before the decoder's input but generates
without it. PEFT has task ids but no task names; names are written to `mpt_jax.json` beside the
adapter.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import msgspec
import numpy as np
from etils import epath
from safetensors.numpy import save

from mpt_jax.convert.hf_weights import read_file
from mpt_jax.core import schema
from mpt_jax.core.tree import match_exactly
from mpt_jax.prompts.base import PromptMethod
from mpt_jax.prompts.mpt import MPT
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.runtime.files import read_json

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
NOTES = "mpt_jax.json"  # our own file, for what PEFT's files cannot hold

SINGLE, MULTITASK = "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING"
COPY_AGAIN = "Download or copy the adapter again."
_TASK_TYPE = "SEQ_2_SEQ_LM"


class Config(msgspec.Struct):
    """The schema of `adapter_config.json`."""

    peft_type: str
    num_virtual_tokens: schema.Positive | None = None  # other methods have none
    task_type: str | None = None
    num_transformer_submodules: schema.Positive | None = None
    token_dim: schema.Positive | None = None
    num_tasks: schema.Positive = 1
    num_ranks: schema.Positive = 1


class Notes(msgspec.Struct):
    """The schema of `mpt_jax.json`."""

    task_names: schema.Names | None = None
    run_names: schema.Names | None = None
    method: str | None = None
    backbone: str | None = None
    embedding_sha256: str | None = None
    backbone_sha256: str | None = None
    backbone_config: dict[str, Any] | None = None
    vocabulary_sha256: str | None = None
    step: schema.Count | None = None


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter in memory.

    Attributes:
        method: MPT or prompt tuning, with the prompt length (and rank) of the adapter.
        params: the method's parameters, in one group, with one row for each task of the adapter.
        notes: the contents of `mpt_jax.json`; empty for adapters that PEFT wrote.
    """

    method: PromptMethod
    params: dict[str, np.ndarray]
    notes: dict[str, Any]

    @property
    def rows(self) -> int:
        """K, the number of tasks."""
        return len(self.params["task_left" if "task_left" in self.params else "table"])


def load_adapter(folder: epath.Path) -> Adapter:
    """Reads an adapter.

    Raises:
        FileNotFoundError: `folder` is not an adapter, or has no tensors.
        ValueError: the adapter's method or kind of model is not supported, it was trained with a
            prompt for the decoder, or tensors are missing, unexpected or of another shape.
    """
    if not (folder / CONFIG).exists():
        raise FileNotFoundError(
            f"{folder} is not a PEFT adapter: it has no {CONFIG}. Check the path."
        )
    config = schema.check(read_json(folder / CONFIG), Config, f"{folder / CONFIG}", COPY_AGAIN)
    if config.peft_type not in (SINGLE, MULTITASK):
        raise ValueError(
            f"{folder / CONFIG} has peft_type {config.peft_type!r}, which cannot be converted. Use "
            f"a {SINGLE} or {MULTITASK} adapter."
        )
    if config.task_type not in (None, _TASK_TYPE):
        raise ValueError(
            f"{folder / CONFIG} has task_type {config.task_type!r}, which cannot be converted. Use "
            f"an adapter of an encoder-decoder model ({_TASK_TYPE}), such as a T5."
        )
    if config.num_virtual_tokens is None:
        raise ValueError(
            f"{folder / CONFIG} has no value for num_virtual_tokens. Set it to the prompt length."
        )
    tensors = _tensors(folder)
    copies = _copies(config, tensors)
    if config.peft_type == MULTITASK and copies != 1:
        raise ValueError(
            f"{folder} was trained with a second prompt before the decoder's input "
            f"(num_transformer_submodules={copies}; PEFT's default is 2), which MPT-JAX does not "
            "support. Train it again with num_transformer_submodules=1."
        )
    _check_shapes(folder, config, tensors, copies)
    notes = _notes(folder)
    prompt = tensors["prompt_embeddings"][None, : config.num_virtual_tokens]
    if config.peft_type == SINGLE:
        return Adapter(PromptTuning(prompt.shape[1]), {"table": prompt}, notes)
    left, right = tensors["prefix_task_cols"], tensors["prefix_task_rows"]
    params = {"shared": prompt, "task_left": left, "task_right": right}
    return Adapter(MPT(prompt.shape[1], rank=left.shape[2]), params, notes)


def _copies(config: Config, tensors: Mapping[str, np.ndarray]) -> int:
    """Returns the number of prompts in the adapter: 2 if it has one for the decoder, otherwise 1.

    If `num_transformer_submodules` is not recorded, PEFT's default of 2 is assumed, unless the
    number of rows shows that there is only one.
    """
    if config.num_transformer_submodules is not None:
        return config.num_transformer_submodules
    rows = len(tensors.get("prompt_embeddings", ()))
    return 1 if config.peft_type == SINGLE and rows == config.num_virtual_tokens else 2


def _notes(folder: epath.Path) -> dict[str, Any]:
    """Returns the fields of `mpt_jax.json` that are not null; {} if the file does not exist."""
    path = folder / NOTES
    if not path.exists():
        return {}
    notes = read_json(path)
    schema.check(notes, Notes, f"{path}", COPY_AGAIN)
    return {name: value for name, value in notes.items() if value is not None}


def _tensors(folder: epath.Path) -> dict[str, np.ndarray]:
    for name in (TENSORS, PICKLED):
        if (folder / name).exists():
            tensors = read_file(folder / name)
            for leaf, x in tensors.items():
                if not x.ndim or not jnp.issubdtype(x.dtype, jnp.floating):
                    raise ValueError(
                        f"{folder / name} holds {leaf} with dtype {x.dtype} and shape {x.shape}, "
                        "but prompt parameters are floating-point arrays with at least one "
                        f"dimension. Save the adapter again in float32. {COPY_AGAIN}"
                    )
            return {leaf: np.asarray(x, np.float32) for leaf, x in tensors.items()}
    raise FileNotFoundError(
        f"{folder} has no tensors: neither {TENSORS} nor {PICKLED} exists. Copy one of them."
    )


def _check_shapes(
    folder: epath.Path, config: Config, tensors: Mapping[str, np.ndarray], copies: int
) -> None:
    shapes = {name: x.shape for name, x in tensors.items()}
    assert config.num_virtual_tokens is not None  # checked by the caller
    rows = copies * config.num_virtual_tokens
    width = config.token_dim or shapes.get("prompt_embeddings", (0, 0))[-1]
    expected: dict[str, tuple[int, ...]] = {"prompt_embeddings": (rows, width)}
    if config.peft_type == MULTITASK:
        tasks, rank = config.num_tasks, config.num_ranks
        expected["prefix_task_cols"] = (tasks, rows, rank)
        expected["prefix_task_rows"] = (tasks, rank, width)
    match_exactly(
        expected,
        shapes,
        f"The adapter {folder}",
        standard=f"its {CONFIG}",
        advice=COPY_AGAIN,
    )


def write_prompt(
    folder: epath.Path, prompt: np.ndarray, backbone: str, notes: Mapping[str, Any]
) -> None:
    """Writes a prompt [P, H] as a PROMPT_TUNING adapter into an empty folder.

    Args:
        folder: the existing, empty folder.
        prompt: the prompt of one task.
        backbone: the name or path of the backbone, written as `base_model_name_or_path`.
        notes: the contents of `mpt_jax.json`.
    """
    fields = {"peft_type": SINGLE, "prompt_tuning_init": "RANDOM"}
    _write(folder, fields, {"prompt_embeddings": prompt}, backbone, notes)


def write_factors(
    folder: epath.Path, params: Mapping[str, np.ndarray], backbone: str, notes: Mapping[str, Any]
) -> None:
    """Writes MPT's parameters of one group as a MULTITASK_PROMPT_TUNING adapter. Row k gets PEFT's
    task id k. The other arguments are as in `write_prompt`."""
    left = params["task_left"]
    fields = {
        "peft_type": MULTITASK,
        "prompt_tuning_init": "RANDOM",
        "num_tasks": left.shape[0],
        "num_ranks": left.shape[2],
    }
    tensors = {
        "prompt_embeddings": params["shared"][0],
        "prefix_task_cols": left,
        "prefix_task_rows": params["task_right"],
    }
    _write(folder, fields, tensors, backbone, notes)


def _write(
    folder: epath.Path,
    fields: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    backbone: str,
    notes: Mapping[str, Any],
) -> None:
    length, width = tensors["prompt_embeddings"].shape
    config = {
        **fields,
        "task_type": _TASK_TYPE,
        "base_model_name_or_path": backbone,
        "inference_mode": True,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": length,
        "token_dim": width,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    plain = {name: np.ascontiguousarray(x, np.float32) for name, x in tensors.items()}
    (folder / TENSORS).write_bytes(save(plain, metadata={"format": "pt"}))
    (folder / NOTES).write_text(json.dumps(dict(notes), indent=2) + "\n")
