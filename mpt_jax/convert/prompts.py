"""Prompts of other programs into artifacts, and artifacts into theirs.

In: PEFT's adapters, NumPy arrays [P,H] and T5X checkpoints of google-research/prompt-tuning, plain
safetensors. Out: PEFT's adapters with MPT's factors or with one plain prompt per run, NumPy arrays,
plain safetensors. What was written is read back and compared before it takes its name.
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

from mpt_jax.artifacts import artifacts
from mpt_jax.convert import detect, load_backbone, load_t5x, parity, peft
from mpt_jax.convert.hf_weights import read_file
from mpt_jax.core.runs import Runs
from mpt_jax.core.tree import flatten
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.runtime.files import new_folder

FOLDED = "folded.safetensors"
# Where google-research/prompt-tuning keeps a prompt in T5X's tree.
_T5X_PROMPT = re.compile(r"encoder/(.*/)?prompt/prompt")
# What config.json of an artifact says that is kept beside an adapter.
_NOTED = ("method", "backbone", "embedding_sha256", "vocabulary_sha256", "step")

Say = Callable[[str], None]


# --- In ------------------------------------------------------------------------------------------


def to_artifact(
    source: epath.Path,
    target: epath.Path,
    *,
    backbone: epath.Path,
    run_names: Sequence[str] = (),
    say: Say = print,
) -> epath.Path:
    """Makes a prompt artifact of another program's prompts.

    Args:
        source: an adapter of PEFT, or a folder of adapters; a `.npy` file; a T5X checkpoint; a
            safetensors file with one [P,H] for each run.
        target: the artifact, to be made.
        backbone: what the prompts were trained with; an artifact records its embedding's digest.
        run_names: of the rows; by default those that the source itself has.
        say: takes the parity line.

    Raises:
        FileExistsError: the target is there already.
        ValueError: another width than the backbone's, another backbone than the source names, or
            no names.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists already and is not overwritten.")
    found = read_prompts(source)
    names = tuple(run_names) or tuple(found.notes.get("run_names", ()))
    if len(names) != found.rows:
        raise ValueError(
            f"{source} holds {found.rows} prompts and there are {len(names)} names for them: give "
            "one for each (--runs NAME ...), in their order."
        )
    tasks = names if run_names else found.notes.get("task_names", names)
    embedding = load_backbone(backbone)["token_embedder"]["embedding"]
    digest = _check_backbone(source, found, embedding, backbone)
    with new_folder(target) as made:
        artifacts.save_artifact(
            made,
            found.method,
            found.params,
            Runs(tasks, names),
            embedding_sha256=digest,
            vocabulary_sha256=found.notes.get("vocabulary_sha256"),
            backbone=found.notes.get("backbone", str(backbone)),
            step=found.notes.get("step", 0),
        )
        say(_same(found.params, artifacts.load_artifact(made).params, target))
    return target


def read_prompts(source: epath.Path) -> peft.Adapter:
    """The prompts of a source as parameters of MPT or prompt tuning; see `to_artifact`.

    Raises:
        FileNotFoundError, ValueError: unreadable, or not prompts.
    """
    kind = detect.recognize(source)
    if kind not in _READERS:
        raise ValueError(f"{source} is of format {kind!r} and holds no prompts of other programs.")
    return _READERS[kind](source)


def _read_peft(source: epath.Path) -> peft.Adapter:
    folders = detect.adapters(source)
    found = [peft.load_adapter(folder) for folder in folders]
    if len(found) == 1:
        return found[0]
    tables = [adapter.params.get("table") for adapter in found]
    shapes = {adapter.params["table"].shape for adapter in found if "table" in adapter.params}
    if any(table is None for table in tables) or len(shapes) != 1:
        raise ValueError(
            f"{source} holds {len(folders)} adapters that cannot be rows of one artifact: they "
            f"must all be {peft.SINGLE}, of one length and width. Convert them one by one."
        )
    bank = np.concatenate([table for table in tables if table is not None])
    return _plain(bank, _common_notes(source, folders, [adapter.notes for adapter in found]))


def _common_notes(
    source: epath.Path, folders: Sequence[epath.Path], notes: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What is noted beside one-prompt adapters, for all as rows of one bank."""
    if len({note["embedding_sha256"] for note in notes if "embedding_sha256" in note}) > 1:
        raise ValueError(
            f"{source} holds adapters of several backbones (embedding_sha256 in their "
            f"{peft.NOTES} differs): they cannot be rows of one artifact. Convert them one by one."
        )
    merged = {name: value for note in reversed(notes) for name, value in note.items()}
    names = [folder.name for folder in folders]
    pairs = zip(names, notes, strict=True)
    tasks = [task for name, note in pairs for task in note.get("task_names", [name])]
    return {**merged, "run_names": names, "task_names": tasks}


def _read_npy(source: epath.Path) -> peft.Adapter:
    try:
        array = np.load(io.BytesIO(source.read_bytes()), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(
            f"{source} is truncated, damaged, or no plain array of numbers: {error}"
        ) from error
    return _plain(_prompt(array, str(source))[None], {})


def _read_safetensors(source: epath.Path) -> peft.Adapter:
    tensors = read_file(source)
    prompts = [_prompt(x, f"{source}, {name}") for name, x in tensors.items()]
    if len({prompt.shape for prompt in prompts}) != 1:
        shapes = {name: x.shape for name, x in tensors.items()}
        raise ValueError(f"{source} must hold prompts of one shape [P, H]; it has {shapes}.")
    return _plain(np.stack(prompts), {"run_names": list(tensors)})


def _read_t5x(source: epath.Path) -> peft.Adapter:
    leaves = flatten(load_t5x(source))
    prompts = [name for name in leaves if _T5X_PROMPT.fullmatch(name)]
    if len(prompts) != 1:
        raise ValueError(
            f"{source} holds {len(prompts)} prompts {prompts or ''}, and one was expected at "
            "encoder/prompt/prompt/prompt, where google-research/prompt-tuning keeps it."
        )
    return _plain(_prompt(leaves[prompts[0]], f"{source}, {prompts[0]}")[None], {})


def _prompt(array: np.ndarray, what: str) -> np.ndarray:
    if array.ndim != 2 or not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{what}: a prompt is [P, H] of floats, not {array.dtype}{array.shape}.")
    return np.asarray(array, np.float32)


def _plain(bank: np.ndarray, notes: dict[str, Any]) -> peft.Adapter:
    """Prompts [K, P, H] as prompt tuning's parameters."""
    return peft.Adapter(PromptTuning(bank.shape[1]), {"table": bank}, notes)


_READERS: dict[str, Callable[[epath.Path], peft.Adapter]] = {
    detect.PEFT: _read_peft,
    detect.NPY: _read_npy,
    detect.SAFETENSORS: _read_safetensors,
    detect.T5X: _read_t5x,
}


def _check_backbone(
    source: epath.Path, found: peft.Adapter, embedding: np.ndarray, backbone: epath.Path
) -> str:
    """The digest of the backbone, if the prompts can belong to it."""
    widths = {x.shape[-1] for name, x in found.params.items() if name != "task_left"}
    if widths != {embedding.shape[1]}:
        raise ValueError(
            f"{source} holds prompts of width {sorted(widths)}, and {backbone} is "
            f"{embedding.shape[1]} wide: they were trained with another model."
        )
    digest = artifacts.embedding_digest(embedding)
    noted = found.notes.get("embedding_sha256", digest)
    if noted != digest:
        raise ValueError(
            f"{source} belongs to a backbone whose embedding has sha256 {noted}, and that of "
            f"{backbone} has {digest}. Prompts only work with the backbone they were trained on."
        )
    return digest


# --- Out -----------------------------------------------------------------------------------------


def from_artifact(source: epath.Path, target: epath.Path, to: str, say: Say = print) -> epath.Path:
    """Writes an artifact's prompts for other programs.

    Args:
        source: the artifact.
        target: a folder to be made. With `'peft'` it is MPT's adapter, task id k for row k (where
            rows fall into several groups: a folder with an adapter for each group); otherwise
            it holds a folder or a file for each run, or `folded.safetensors`.
        to: `'peft'` (MPT's factors; a plain prompt for prompt tuning), `'peft-folded'`, `'npy'` or
            `'safetensors'`.
        say: takes the parity line.

    Raises:
        FileExistsError: the target is there already.
        ValueError: the method has no prompts, or makes them by the text, or PEFT has no form for
            them.
    """
    artifact = artifacts.load_artifact(source)
    if not artifact.method.prompt_length:
        raise ValueError(f"{source} is of {artifact.method.name!r}, which has no prompt.")
    if artifact.method.reads_text:
        raise ValueError(
            f"{source} is of {artifact.method.name!r}, whose prompts depend on the text they stand "
            "before: no run has one prompt, and other programs have no form for what makes it. "
            "`mpt-jax predict` and `mpt-jax export` take the artifact as it is."
        )
    if unfit := [name for name in artifact.runs.run_names if "/" in name]:
        raise ValueError(f"{source}: files are named by runs, and {unfit} cannot name one.")
    with new_folder(target) as made:
        expected, found = _WRITERS[to](artifact, made)
        say(_same(expected, found, target))
    return target


# What was to be written and what was read back, by name.
Both = tuple[dict[str, Any], dict[str, Any]]


def _write_peft(artifact: artifacts.Artifact, made: epath.Path) -> Both:
    form = _FORMS.get(artifact.method.name)
    if form is None:
        raise ValueError(
            f"PEFT has no form for the parameters of {artifact.method.name!r}; --to "
            f"{detect.PEFT_FOLDED} writes the prompts that they make."
        )
    return form(artifact, made)


def _write_factors(artifact: artifacts.Artifact, made: epath.Path) -> Both:
    """MPT: one adapter, or one for each group in a folder named by its runs."""
    runs, params = artifact.runs, {k: np.asarray(v) for k, v in artifact.params.items()}
    expected, found = {}, {}
    for group in range(runs.num_groups):
        rows = [row for row, of in enumerate(runs.group_of_row) if of == group]
        name = "+".join(runs.run_names[row] for row in rows) if runs.num_groups > 1 else ""
        own = {"shared": params["shared"][[group]]}
        own |= {part: params[part][rows] for part in ("task_left", "task_right")}
        folder = made / name if name else made
        folder.mkdir(exist_ok=True)
        peft.write_factors(folder, own, artifact.config["backbone"], _notes(artifact, rows))
        expected[name or "adapter"] = own
        found[name or "adapter"] = peft.load_adapter(folder).params
    return expected, found


def _write_folded(artifact: artifacts.Artifact, made: epath.Path) -> Both:
    """An adapter for each run."""
    expected, found = {}, {}
    for row, (name, prompt) in enumerate(_folded(artifact).items()):
        (made / name).mkdir()
        notes = _notes(artifact, [row])
        peft.write_prompt(made / name, prompt, artifact.config["backbone"], notes)
        expected[name], found[name] = prompt, peft.load_adapter(made / name).params["table"][0]
    return expected, found


def _write_npy(artifact: artifacts.Artifact, made: epath.Path) -> Both:
    expected, found = _folded(artifact), {}
    for name, prompt in expected.items():
        buffer = io.BytesIO()
        np.save(buffer, prompt, allow_pickle=False)
        (made / f"{name}.npy").write_bytes(buffer.getvalue())
        found[name] = _read_npy(made / f"{name}.npy").params["table"][0]
    return expected, found


def _write_safetensors(artifact: artifacts.Artifact, made: epath.Path) -> Both:
    expected = _folded(artifact)
    (made / FOLDED).write_bytes(save(expected))
    return expected, read_file(made / FOLDED)


_FORMS = {"mpt": _write_factors, "prompt_tuning": _write_folded}
_WRITERS: dict[str, Callable[[artifacts.Artifact, epath.Path], Both]] = {
    detect.PEFT: _write_peft,
    detect.PEFT_FOLDED: _write_folded,
    detect.NPY: _write_npy,
    detect.SAFETENSORS: _write_safetensors,
}


def _folded(artifact: artifacts.Artifact) -> dict[str, np.ndarray]:
    """The plain prompt [P, H] of every run."""
    prompts = [np.ascontiguousarray(prompt, np.float32) for prompt in artifact.plain()]
    return dict(zip(artifact.runs.run_names, prompts, strict=True))


def _notes(artifact: artifacts.Artifact, rows: Sequence[int]) -> dict[str, Any]:
    """What an adapter's `mpt_jax.json` says, for some rows of the artifact."""
    return {
        "task_names": [artifact.runs.task_names[row] for row in rows],
        "run_names": [artifact.runs.run_names[row] for row in rows],
        **{field: artifact.config.get(field) for field in _NOTED},
    }


def _same(expected: Mapping[str, Any], found: Mapping[str, Any], target: epath.Path) -> str:
    return f"{parity.identical(expected, found, str(target))}: identical"
