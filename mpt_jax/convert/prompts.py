"""Conversion of prompts from other programs to artifacts, and from artifacts to other programs.

Formats that are read: PEFT's adapters, NumPy arrays [P,H] and T5X checkpoints of
google-research/prompt-tuning, and plain safetensors. Formats that are written: PEFT's adapters with
MPT's factors or with one plain prompt per run, NumPy arrays, and plain safetensors. All output is
read back and compared before it is moved to the target folder.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors.numpy import save

from mpt_jax.artifacts import artifacts, compatibility
from mpt_jax.artifacts.backbone_digest import CONFIG_FIELD, FIELD, backbone_config, backbone_digest
from mpt_jax.convert import detect, hf, load_backbone, load_t5x, parity, peft
from mpt_jax.convert.hf_weights import read_file
from mpt_jax.core.comparison import abbreviate, differences
from mpt_jax.core.runs import Runs
from mpt_jax.core.tree import check_floats, flatten
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.runtime.files import new_folder
from mpt_jax.runtime.tensors import load_npy

FOLDED = "folded.safetensors"
# Where google-research/prompt-tuning keeps a prompt in T5X's tree.
_T5X_PROMPT = re.compile(r"encoder/(.*/)?prompt/prompt")
# Fields of an artifact's config.json that are also written beside an adapter.
_BACKBONE = ("backbone", "embedding_sha256", FIELD, CONFIG_FIELD)
_NOTED = ("method", *_BACKBONE, "vocabulary_sha256", "step")

Say = Callable[[str], None]


# --- To artifacts --------------------------------------------------------------------------------


def to_artifact(
    source: epath.Path,
    target: epath.Path,
    *,
    backbone: epath.Path,
    run_names: Sequence[str] = (),
    say: Say = print,
) -> epath.Path:
    """Converts another program's prompts to a prompt artifact.

    Args:
        source: a PEFT adapter, or a folder of adapters; a `.npy` file; a T5X checkpoint; or a
            safetensors file with one prompt [P,H] for each run.
        target: the artifact to create.
        backbone: the backbone that the prompts were trained with. The artifact records its
            digests.
        run_names: the names of the prompts, in order. If empty, the names that the source records
            are used.
        say: called with a line that reports the result of the comparison, and with a warning if
            the source records only the digest of the backbone's embedding.

    Raises:
        FileExistsError: the target already exists.
        FileNotFoundError: the source or the backbone does not exist.
        ValueError: the source cannot be read or holds no prompts, the width of the prompts differs
            from the backbone's, the source records another backbone, or the number of names differs
            from the number of prompts.
    """
    if target.exists():
        raise FileExistsError(
            f"{target} already exists. Choose another target, or remove the existing one."
        )
    adapter = read_prompts(source)
    names = tuple(run_names) or tuple(adapter.notes.get("run_names", ()))
    if len(names) != adapter.rows:
        raise ValueError(
            f"The number of prompts in {source} is {adapter.rows}, but the number of run names is "
            f"{len(names)}. Set --runs to one name per prompt, in the same order."
        )
    tasks = names if run_names else adapter.notes.get("task_names", names)
    digests = _check_backbone(source, adapter, backbone, say)
    with new_folder(target) as scratch:
        artifacts.save_artifact(
            scratch,
            adapter.method,
            adapter.params,
            Runs(tasks, names),
            digests=digests | {"vocabulary_sha256": adapter.notes.get("vocabulary_sha256")},
            backbone_config=_check_config(source, adapter, backbone, say),
            backbone=adapter.notes.get("backbone", str(backbone)),
            step=adapter.notes.get("step", 0),
        )
        say(_parity_line(adapter.params, artifacts.load_artifact(scratch).params, target))
    return target


def read_prompts(source: epath.Path) -> peft.Adapter:
    """Reads the prompts of a source as parameters of MPT or prompt tuning; see `to_artifact`.

    Raises:
        FileNotFoundError, ValueError: the source cannot be read, holds no prompts, or holds prompts
            that are not finite.
    """
    kind = detect.recognize(source)
    if kind not in _READERS:
        raise ValueError(
            f"{source} has format {kind!r}, which cannot be converted to an artifact. Use prompts "
            f"in one of the formats {', '.join(_READERS)}."
        )
    adapter = _READERS[kind](source)
    check_floats(adapter.params, f"{source}", "Copy the prompts again, or train them again.")
    return adapter


def _read_peft(source: epath.Path) -> peft.Adapter:
    folders = detect.adapters(source)
    adapters = [peft.load_adapter(folder) for folder in folders]
    if len(adapters) == 1:
        return adapters[0]
    tables = [adapter.params.get("table") for adapter in adapters]
    shapes = {adapter.params["table"].shape for adapter in adapters if "table" in adapter.params}
    if any(table is None for table in tables) or len(shapes) != 1:
        raise ValueError(
            f"{source} holds {len(folders)} adapters that cannot be combined in one artifact, "
            f"because not all are {peft.SINGLE} adapters with the same prompt length and width. "
            "Convert them one by one."
        )
    bank = np.concatenate([table for table in tables if table is not None])
    return _plain(bank, _common_notes(source, folders, [adapter.notes for adapter in adapters]))


def _common_notes(
    source: epath.Path, folders: Sequence[epath.Path], notes: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Merges the notes of adapters with one prompt each, which become rows of one artifact."""
    for field in ("embedding_sha256", FIELD):
        if len({note[field] for note in notes if note.get(field) is not None}) > 1:
            raise ValueError(
                f"{source} holds adapters of several backbones, which cannot be combined in one "
                f"artifact: {field} in their {peft.NOTES} files differs. Convert them one by one."
            )
    merged = {name: value for note in reversed(notes) for name, value in note.items()}
    names = [folder.name for folder in folders]
    pairs = zip(names, notes, strict=True)
    tasks = [task for name, note in pairs for task in note.get("task_names", [name])]
    return {**merged, "run_names": names, "task_names": tasks}


def _read_npy(source: epath.Path) -> peft.Adapter:
    array = load_npy(source.read_bytes(), str(source))
    return _plain(_prompt(array, str(source))[None], {})


def _read_safetensors(source: epath.Path) -> peft.Adapter:
    tensors = read_file(source)
    prompts = [_prompt(x, f"{source}, {name}") for name, x in tensors.items()]
    if len({prompt.shape for prompt in prompts}) != 1:
        shapes = abbreviate([f"{name} {x.shape}" for name, x in tensors.items()])
        raise ValueError(
            f"{source} must hold prompts of one shape [P, H], but it has {shapes or 'no tensors'}. "
            "Save prompts of different shapes in separate files."
        )
    return _plain(np.stack(prompts), {"run_names": list(tensors)})


def _read_t5x(source: epath.Path) -> peft.Adapter:
    leaves = flatten(load_t5x(source))
    prompts = [name for name in leaves if _T5X_PROMPT.fullmatch(name)]
    if len(prompts) != 1:
        raise ValueError(
            f"{source} holds {len(prompts)} prompts{': ' * bool(prompts)}{abbreviate(prompts)}. "
            "Use a checkpoint of google-research/prompt-tuning with exactly one prompt, at "
            "encoder/prompt/prompt/prompt."
        )
    return _plain(_prompt(leaves[prompts[0]], f"{source}, {prompts[0]}")[None], {})


def _prompt(array: np.ndarray, what: str) -> np.ndarray:
    if array.ndim != 2 or not array.size or not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"{what} is not a prompt: expected floats of shape [P, H], got {array.dtype} of shape "
            f"{array.shape}. Save each prompt as one array [P, H]."
        )
    return np.asarray(array, np.float32)


def _plain(bank: np.ndarray, notes: dict[str, Any]) -> peft.Adapter:
    """Returns prompts [K, P, H] as an adapter with prompt tuning's parameters."""
    return peft.Adapter(PromptTuning(bank.shape[1]), {"table": bank}, notes)


_READERS: dict[str, Callable[[epath.Path], peft.Adapter]] = {
    detect.PEFT: _read_peft,
    detect.NPY: _read_npy,
    detect.SAFETENSORS: _read_safetensors,
    detect.T5X: _read_t5x,
}


def _check_backbone(
    source: epath.Path, adapter: peft.Adapter, backbone: epath.Path, say: Say
) -> dict[str, Any]:
    """Returns the backbone's digests if the prompts are compatible with it."""
    params = load_backbone(backbone)
    embedding = params["token_embedder"]["embedding"]
    widths = {x.shape[-1] for name, x in adapter.params.items() if name != "task_left"}
    if widths != {embedding.shape[1]}:
        raise ValueError(
            f"{source} holds prompts of width {' and '.join(map(str, sorted(widths)))}, but "
            f"{backbone} has width {embedding.shape[1]}. Set --backbone to the backbone that the "
            "prompts were trained with."
        )
    digests = {
        "embedding_sha256": artifacts.embedding_digest(embedding),
        FIELD: backbone_digest(params),
    }
    for field, what in (("embedding_sha256", "embedding"), (FIELD, "weights")):
        noted = adapter.notes.get(field)
        if noted not in (None, digests[field]):
            raise ValueError(
                f"The prompts in {source} were trained with another backbone: the sha256 of its "
                f"{what} is {noted}, but {backbone} has {digests[field]}. Set --backbone to the "
                "backbone that the prompts were trained with."
            )
    if "embedding_sha256" in adapter.notes and adapter.notes.get(FIELD) is None:
        say(compatibility.embedding_only(f"{source}"))
    return digests


def _check_config(
    source: epath.Path, adapter: peft.Adapter, backbone: epath.Path, say: Say
) -> dict[str, Any] | None:
    """Returns the backbone's configuration, which the prompts must be compatible with.

    It is taken from the adapter's notes or, if they do not record it, from the backbone's
    `config.json`; None if neither has it.
    """
    noted = adapter.notes.get(CONFIG_FIELD)
    if detect.recognize(backbone) != detect.HF:  # shapes do not show all of it
        return noted
    current = backbone_config(hf.read_config(backbone / hf.CONFIG))
    if noted is None:
        if adapter.notes.get(FIELD) is not None:
            say(compatibility.weights_only(f"{source}"))
        return current
    names = [name for name in current if name in noted]
    if changes := differences(noted, current, names):
        raise ValueError(
            f"The prompts in {source} were trained with another configuration of their backbone "
            f"({changes}). Correct {backbone / hf.CONFIG}, or set --backbone to the backbone that "
            "the prompts were trained with."
        )
    return noted


# --- From artifacts ------------------------------------------------------------------------------


def from_artifact(source: epath.Path, target: epath.Path, to: str, say: Say = print) -> epath.Path:
    """Writes an artifact's prompts for other programs.

    Args:
        source: the artifact.
        target: the folder to create. For MPT, `'peft'` writes one adapter, in which bank row k has
            task id k; or, if the artifact has several groups, one adapter per group, each in a
            folder named after its runs. Otherwise, each run gets a folder (PEFT) or a file
            (`.npy`), or all runs share one `folded.safetensors`.
        to: `'peft'` (MPT's factors, or the plain prompts of prompt tuning), `'peft-folded'` (plain
            prompts), `'npy'` or `'safetensors'`.
        say: called with a line that reports the result of the comparison.

    Raises:
        FileExistsError: the target already exists.
        FileNotFoundError: the source holds no artifact.
        ValueError: the artifact cannot be read, its method has no prompts, its prompts depend on
            the text, PEFT has no format for them, or a run name cannot be a file name.
    """
    artifact = artifacts.load_artifact(source)
    if not artifact.method.prompt_length:
        raise ValueError(
            f"{source} has no prompts: its method is {artifact.method.name!r}. Choose an artifact "
            "of a prompt method."
        )
    if artifact.method.reads_input:
        raise ValueError(
            f"{source} has the method {artifact.method.name!r}, whose prompts depend on the "
            f"{'text' if artifact.method.reads_text else 'image'}. "
            "Other programs have no format for such prompts. Use the artifact itself with `mpt-jax "
            "predict` or `mpt-jax export`."
        )
    names = artifact.runs.run_names
    if unfit := [name for name in names if name in (".", "..") or "/" in name or "\0" in name]:
        raise ValueError(
            f"{source} has runs whose names cannot be file names: {', '.join(map(repr, unfit))}. "
            "Use the artifact itself with `mpt-jax predict` or `mpt-jax export`."
        )
    with new_folder(target) as scratch:
        expected, restored = _WRITERS[to](artifact, scratch)
        say(_parity_line(expected, restored, target))
    return target


# The expected arrays and those that were read back, by name.
Both = tuple[dict[str, Any], dict[str, Any]]


def _write_peft(artifact: artifacts.Artifact, target: epath.Path) -> Both:
    writer = _PEFT_WRITERS.get(artifact.method.name)
    if writer is None:
        raise ValueError(
            f"PEFT has no format for the parameters of the method {artifact.method.name!r}. Set "
            f"--to {detect.PEFT_FOLDED} to write plain prompts."
        )
    return writer(artifact, target)


def _write_factors(artifact: artifacts.Artifact, target: epath.Path) -> Both:
    """Writes MPT's factors as one adapter, or as one per group in folders named after its runs."""
    runs, params = artifact.runs, {k: np.asarray(v) for k, v in artifact.params.items()}
    expected, restored = {}, {}
    for group in range(runs.num_groups):
        rows = [row for row, row_group in enumerate(runs.group_of_row) if row_group == group]
        name = "+".join(runs.run_names[row] for row in rows) if runs.num_groups > 1 else ""
        factors = {"shared": params["shared"][[group]]}
        factors |= {part: params[part][rows] for part in ("task_left", "task_right")}
        folder = target / name if name else target
        folder.mkdir(exist_ok=True)
        peft.write_factors(folder, factors, artifact.config["backbone"], _notes(artifact, rows))
        expected[name or "adapter"] = factors
        restored[name or "adapter"] = peft.load_adapter(folder).params
    return expected, restored


def _write_folded(artifact: artifacts.Artifact, target: epath.Path) -> Both:
    """Writes the plain prompt of each run as an adapter."""
    expected, restored = {}, {}
    for row, (name, prompt) in enumerate(_folded(artifact).items()):
        folder = target / name
        folder.mkdir()
        notes = _notes(artifact, [row])
        peft.write_prompt(folder, prompt, artifact.config["backbone"], notes)
        expected[name], restored[name] = prompt, peft.load_adapter(folder).params["table"][0]
    return expected, restored


def _write_npy(artifact: artifacts.Artifact, target: epath.Path) -> Both:
    expected, restored = _folded(artifact), {}
    for name, prompt in expected.items():
        buffer = io.BytesIO()
        np.save(buffer, prompt, allow_pickle=False)
        (target / f"{name}.npy").write_bytes(buffer.getvalue())
        restored[name] = _read_npy(target / f"{name}.npy").params["table"][0]
    return expected, restored


def _write_safetensors(artifact: artifacts.Artifact, target: epath.Path) -> Both:
    expected = _folded(artifact)
    (target / FOLDED).write_bytes(save(expected))
    return expected, read_file(target / FOLDED)


_PEFT_WRITERS = {"mpt": _write_factors, "prompt_tuning": _write_folded}
_WRITERS: dict[str, Callable[[artifacts.Artifact, epath.Path], Both]] = {
    detect.PEFT: _write_peft,
    detect.PEFT_FOLDED: _write_folded,
    detect.NPY: _write_npy,
    detect.SAFETENSORS: _write_safetensors,
}


def _folded(artifact: artifacts.Artifact) -> dict[str, np.ndarray]:
    """Returns the plain prompt [P, H] of every run, by name."""
    prompts = [np.ascontiguousarray(prompt, np.float32) for prompt in artifact.plain()]
    return dict(zip(artifact.runs.run_names, prompts, strict=True))


def _notes(artifact: artifacts.Artifact, rows: Sequence[int]) -> dict[str, Any]:
    """Returns the contents of an adapter's `mpt_jax.json`, for some rows of the artifact."""
    return {
        "task_names": [artifact.runs.task_names[row] for row in rows],
        "run_names": [artifact.runs.run_names[row] for row in rows],
        **{field: artifact.config.get(field) for field in _NOTED},
    }


def _parity_line(
    expected: Mapping[str, Any], restored: Mapping[str, Any], target: epath.Path
) -> str:
    return f"{parity.identical(expected, restored, str(target))}: identical"
