"""Files that a process left, as JSON values that can be compared on another day and machine."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from names import ADDED, ADDED_PARAGRAPHS, DEFAULTS, PHRASES, RENAMED

os.environ["JAX_PLATFORMS"] = "cpu"  # arrays are only read here

REPOSITORY = Path(__file__).resolve().parents[2]
BITS = "bits equal"

# Not of what a program computes: when, where, by which command and versions, how fast. The last
# line of a card is a digest of such lines too; a checkpoint's seal, one of the position below.
VOLATILE_KEYS = re.compile(
    r"timing/.*|started|command|mpt_jax|git_revision|python|packages|platform|devices|versions"
    r"|.*\.jax"  # digests of what LEFT_OUT has
)
VOLATILE_LINES = re.compile(
    r"^\| (flax|jax|jaxlib|mpt_jax|numpy|optax|orbax-checkpoint|seqio|tensorflow|git revision) \|"
    r"|sha256 of the lines above"
)
# Locks, notes on finished saves, TensorBoard's files (times; see `tensorboard`), compiled programs
# (they hold the source lines they came from; what they compute is in what an entry prints), and
# T5X's own description of the data's position (see `_of_meta`).
LEFT_OUT = re.compile(
    r"(^|/)(events\.out\.tfevents[^/]*|running\.json|commit_success\.txt|[^/]*\.jax)$"
    r"|(^|/)dataset/"
)


def read_files(
    folder: Path, said: str = "", tensorboard: bool = False
) -> dict[str, dict[str, Any]]:
    """What lies in a folder, by relative path, and under `said` what was printed.

    Args:
        folder: where processes ran.
        said: what they printed.
        tensorboard: reads TensorBoard's files too.
    """
    normal = lambda text: normalized(text, folder)  # noqa: E731
    found = {"said": _text(normal(said))} if said else {}
    checkpoints = sorted(path.parent for path in folder.rglob("_CHECKPOINT_METADATA"))
    for path in checkpoints:
        name = str(path.relative_to(folder))
        found[f"{name}/state"] = {"leaves": _leaves(_of_orbax(path / "state"))}
        if (path / "meta" / "metadata").exists():
            found[f"{name}/meta"] = _json(_of_meta(path / "meta" / "metadata"), normal)
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or any(parent in checkpoints for parent in path.parents):
            continue
        if tensorboard and path.name.startswith("events.out"):
            found[f"{path.parent.relative_to(folder)}/events"] = _json(_of_events(path), normal)
        elif not LEFT_OUT.search(name):
            found[name] = _read(path, normal)
    return json.loads(json.dumps(found))


def normalized(text: str, folder: Path) -> str:
    """A text without absolute paths, and without lines of versions."""
    text = text.replace(str(folder), "<here>").replace(str(REPOSITORY), "<repository>")
    return "\n".join(line for line in text.splitlines() if not VOLATILE_LINES.search(line))


# --- Files ---------------------------------------------------------------------------------------


def _read(path: Path, normal: Callable[[str], str]) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        from safetensors.numpy import load_file

        return {"leaves": _leaves(load_file(path))}
    if path.suffix == ".npz":
        return {"leaves": _leaves(dict(np.load(path)))}
    if path.suffix == ".npy":
        return {"leaves": _leaves({"array": np.load(path)})}
    if path.name == "checkpoint":  # T5X's, of one file
        from flax import serialization

        return {"leaves": _leaves(serialization.msgpack_restore(path.read_bytes()))}
    try:
        text = path.read_text()
    except UnicodeDecodeError:
        return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    if path.suffix == ".json":
        return _json(json.loads(text), normal)
    if path.suffix == ".gin":
        return _json(gin_bindings(normal(text)), normal)
    if ".jsonl" in path.name:
        return _json(_values(text), normal)
    return _text(normal(text))


def _values(text: str) -> list[Any]:
    """The values of JSON lines, or the one of a note beside them."""
    try:
        return [json.loads(line) for line in text.splitlines()]
    except json.JSONDecodeError:
        return [json.loads(text)]


def gin_bindings(text: str) -> dict[str, str]:
    """{what is bound: its value} of a gin file, without its imports, comments and order."""
    found, name = {}, ""
    for line in text.splitlines():
        if re.match(r"(#|from |import |$)", line):
            continue
        if bound := re.match(r"([\w./]+) = ?(.*)", line):
            name = bound[1]
            found[name] = bound[2].strip(" \\")
        else:
            found[name] = f"{found[name]} {line.strip()}".strip()
    return found


def _of_orbax(path: Path) -> Any:
    import jax
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler()
    tree = handler.metadata(path)
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree.tree)
    return handler.restore(path, args=ocp.args.PyTreeRestore(restore_args=args))


def _of_meta(path: Path) -> dict[str, Any]:
    """What our checkpoints say beside their arrays. Where the data stands is left out: it holds
    what was read ahead, which depends on how fast the steps were; and so is the digest of it all.
    That a resumed run goes on at the right example shows in its prompts."""
    meta = json.loads(path.read_text())
    meta.pop("sha256", None)
    if meta.get("data"):
        meta["data"].pop("packed", None)
    return meta


def _of_events(path: Path) -> dict[str, dict[str, float]]:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util import tensor_util

    found: dict[str, dict[str, float]] = {}
    for event in EventFileLoader(str(path)).Load():
        for value in event.summary.value:
            array = tensor_util.make_ndarray(value.tensor)
            if array.dtype.kind == "f" and not array.shape:
                found.setdefault(value.tag, {})[str(event.step)] = float(array)
    return found


def _leaves(tree: Any) -> dict[str, dict[str, Any]]:
    import jax

    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(key, simple=True, separator="/"): _leaf(x) for key, x in pairs}


def _leaf(value: Any) -> dict[str, Any]:
    value = np.ascontiguousarray(value)
    numbers = value.astype(np.float64)
    return {
        "sha256": hashlib.sha256(value.tobytes()).hexdigest(),
        "dtype": str(value.dtype),
        "shape": list(value.shape),
        "mean": float(np.mean(numbers)),
        "rms": float(np.sqrt(np.mean(numbers**2))),
    }


def _json(value: Any, normal: Callable[[str], str]) -> dict[str, Any]:
    return {"content": _stable(value, normal)}


def _text(text: str) -> dict[str, Any]:
    return {"content": text.splitlines()}


def _stable(value: Any, normal: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {k: _stable(v, normal) for k, v in value.items() if not VOLATILE_KEYS.fullmatch(k)}
    if isinstance(value, list):
        return [_stable(x, normal) for x in value]
    return normal(value) if isinstance(value, str) else value


# --- Comparing -----------------------------------------------------------------------------------


def describe(found: dict[str, Any]) -> str:
    """How much an entry holds."""
    leaves = sum(len(file.get("leaves", ())) for file in found.values())
    return f"{len(found)} files, {leaves} arrays"


def renamed(value: Any) -> Any:
    """A value with today's names for what the record calls otherwise. Where a file of the old name
    still lies beside one of the new (a resumed fixture), the new one stays."""
    if isinstance(value, dict):
        return {renamed(name): renamed(x) for name, x in sorted(value.items())}
    if isinstance(value, list):
        return [renamed(x) for x in value]
    if isinstance(value, str):
        for phrase, now in PHRASES.items():
            value = value.replace(phrase, now)
        return re.sub(r"\w+", lambda word: RENAMED.get(word[0], word[0]), value)
    return value


def without_added(lines: list[Any]) -> list[Any]:
    """The lines of a text without the paragraphs that later versions add."""
    added = [i for i, line in enumerate(lines) if str(line).startswith(ADDED_PARAGRAPHS)]
    return [line for i, line in enumerate(lines) if i not in added and i - 1 not in added]


def flat_note(note: dict[str, Any]) -> dict[str, Any]:
    """A note that an output is complete, as the record has it: what it was made from is not nested,
    and it does not count lines and bytes (which vary with the digits of scores)."""
    (values,) = note["content"]
    values = {**values, **values.get("made_from", {})}
    kept = {k: v for k, v in values.items() if k not in ("made_from", "lines", "bytes")}
    return {**note, "content": [kept]}


_OF_INPUTS = ("embedding_sha256", "backbone_sha256", "vocabulary_sha256")


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """What counts as close.

    Attributes:
        relative: of numbers, and of the mean and size of arrays on the scale of their size.
        digests: whether digests may differ.
    """

    relative: float
    digests: bool


def compare(saved: dict[str, Any], found: dict[str, Any], relative: float) -> tuple[str, list[str]]:
    """Compares an entry with the record; returns which comparison held, and what differs."""
    saved, found = renamed(saved), renamed(found)
    for name in (name for name in saved.keys() & found.keys() if name.endswith(".COMPLETED")):
        saved[name], found[name] = flat_note(saved[name]), flat_note(found[name])
    for name in (name for name in found if name.endswith("README.md")):
        found[name] = {**found[name], "content": without_added(found[name]["content"])}
    wrong = [f"{name} is gone" for name in sorted(saved.keys() - found.keys())]
    wrong += [f"{name} is new" for name in sorted(found.keys() - saved.keys())]
    if not saved:
        wrong.append("the record has nothing of it")
    both = sorted(saved.keys() & found.keys())
    # Digests of trained values may differ only if the values do.
    digests = any(saved[x].get("leaves") != found[x].get("leaves") for x in both)
    tolerance = Tolerance(relative, digests)
    exact = True
    for name in both:
        for close, what in _differences(saved[name], found[name], name, tolerance):
            exact = False
            wrong += [] if close else [what]
    if wrong:
        return f"{len(wrong)} DIFFERENCES", wrong
    within = f"{relative:.0e}".replace("e-0", "e-")
    return BITS if exact else f"bits differ, values within {within}", wrong


def _differences(
    saved: Any, found: Any, where: str, tolerance: Tolerance
) -> Iterator[tuple[bool, str]]:
    """(whether it is close, what and where) for all that is not equal."""
    if saved == found:
        return
    close = False
    if isinstance(saved, dict) and isinstance(found, dict):
        if "rms" not in saved or "rms" not in found:
            for name in sorted((saved.keys() ^ found.keys()) - (ADDED - saved.keys())):
                yield False, f"{where}: {name} is {'new' if name in found else 'gone'}"
            for name in sorted(saved.keys() & found.keys()):
                # Those of the backbone and the vocabulary are of files that nobody changes.
                may = tolerance.digests and name not in _OF_INPUTS
                if DEFAULTS.get(name) == (saved[name], found[name]):
                    continue
                inner = dataclasses.replace(tolerance, digests=may)
                if name == "checksums" and may and saved[name].keys() == found[name].keys():
                    yield True, f"{where}: {name}"
                else:
                    yield from _differences(saved[name], found[name], f"{where}: {name}", inner)
            return
        close = _close(saved, found, tolerance.relative)
    elif isinstance(saved, list) and isinstance(found, list) and len(saved) == len(found):
        for i, pair in enumerate(zip(saved, found, strict=True)):
            yield from _differences(*pair, f"{where}[{i}]", tolerance)
        return
    elif isinstance(saved, float) and isinstance(found, (float, int)):
        close = math.isclose(saved, found, rel_tol=tolerance.relative, abs_tol=1e-6)
        close = close or (math.isnan(saved) and math.isnan(found))
    elif isinstance(saved, str) and isinstance(found, str):
        close = _same_words(saved, found, tolerance)
    yield close, f"{where}: {str(saved)[:300]!r} is {str(found)[:300]!r}"


def _close(saved: dict[str, Any], found: dict[str, Any], relative: float) -> bool:
    """Whether two arrays of floats agree by their means, on the scale of their size, and sizes."""
    same = all(saved[name] == found[name] for name in ("dtype", "shape"))
    floats = "float" in saved["dtype"]
    near = [abs(saved[x] - found[x]) <= relative * saved["rms"] for x in ("mean", "rms")]
    return same and floats and all(near)


_NUMBER = re.compile(r"(-?\d+\.\d+(?:e[-+]?\d+)?)")


def _same_words(saved: str, found: str, tolerance: Tolerance) -> bool:
    """Whether two texts differ by little in fractions, and perhaps in digests, alone."""
    if tolerance.digests:
        saved, found = (re.sub(r"\b[0-9a-f]{64}\b", "<sha256>", text) for text in (saved, found))
    pairs = itertools.zip_longest(_NUMBER.split(saved), _NUMBER.split(found))
    return all(
        a == b
        or (
            bool(a and b and _NUMBER.fullmatch(a) and _NUMBER.fullmatch(b))
            and math.isclose(float(a), float(b), rel_tol=tolerance.relative, abs_tol=1e-6)
        )
        for a, b in pairs
    )
