"""The model card of a prompt artifact: its README.md, in Markdown with front matter for the Hugging
Face Hub.

A card is generated from the artifact's config.json and from further facts about the run (`Facts`).
Sections that only the author can write are marked with `TO_FILL`.

The last line holds a digest of the lines above it. If the digest does not match, a person has
edited the card, and no run overwrites it (`for_folder`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from absl import logging
from etils import epath

from mpt_jax.core.runs import Runs, data_name
from mpt_jax.prompts.base import method_from_config

NAME = "README.md"
# A metric that is 1 if all predictions of a run were the same while its targets differed; absent
# otherwise.
CONSTANT = "constant_prediction"
TO_FILL = "to be filled in by the author"
AUTHORS = {
    "License": "under which terms these prompts may be used. They hold nothing of the backbone, "
    "but work only with it, and its license and those of the data may bind them.",
    "Intended use": "who may use these prompts for what, and what they are not for.",
    "Known limits and biases": "where they fail, what the data leaves out, and whom errors hurt.",
}
# Hub identifiers have exactly one slash; other backbones are plain names or paths.
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_SEAL = "<!-- Written by mpt_jax, which keeps an edited card as it is. sha256 of the lines above: "
_SEALED = re.compile(rb"(.*\n)" + re.escape(_SEAL.encode()) + rb"([0-9a-f]{64}) -->\n", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Split:
    """A split of a task's data.

    Attributes:
        rows_of: a description of the split's rows; '' if the split's name is enough.
        rows: the number of rows, as published or as counted; None if unknown.
    """

    rows_of: str = ""
    rows: int | None = None


@dataclasses.dataclass(frozen=True)
class Data:
    """The source and splits of a task's data.

    Attributes:
        source: the data set with its version, or the files.
        splits: the splits, by name.
    """

    source: str
    splits: Mapping[str, Split]


@dataclasses.dataclass(frozen=True)
class Facts:
    """Facts for a card that are not in config.json; every field is optional.

    Attributes:
        data: the data of each run.
        trained_on: for each run, the number of training examples that were truncated to the length
            limits, and the number of all training examples.
        evaluated: for each run, the number of examples that its metrics were computed on.
        evaluated_split: the split that the metrics were computed on.
        not_evaluated: {run: the split that its task lacks}, for runs that were not evaluated.
        num_trainable: the number of trained parameters, including those outside the artifact.
        git_revision: the git revision of the code.
        packages: the version of each package.
    """

    data: Mapping[str, Data] = dataclasses.field(default_factory=dict)
    trained_on: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    evaluated: Mapping[str, int] = dataclasses.field(default_factory=dict)
    evaluated_split: str = ""
    not_evaluated: Mapping[str, str] = dataclasses.field(default_factory=dict)
    num_trainable: int | None = None
    git_revision: str | None = None
    packages: Mapping[str, str | None] = dataclasses.field(default_factory=dict)


def data_of(task: Any) -> Data:
    """Describes the data of a SeqIO task.

    Args:
        task: the SeqIO task. Its `source` may have the attributes of
            `mpt_jax.tasks.splits.PartsSource`: `data`, the name of a data set, and `parts`, {split:
            part}, each part with `split`, `start` and `stop`. Or it may have the attributes of a
            few-shot source (`mpt_jax.tasks.few_shot`): `source`, the source of the whole data, and
            `draw`, the rows drawn from it.
    """
    source, draw = task.source, getattr(task.source, "draw", None)
    whole = source.source if draw else source
    parts: Mapping[str, Any] = getattr(whole, "parts", {})
    name = getattr(whole, "data", None) or str(whole)
    if type(whole).__name__ == "FunctionDataSource":
        name = "made by a function, in memory"
    named = source.splits or ()
    rows = {split: _rows_of(parts[split]) if split in parts else "" for split in named}
    if draw:
        rows |= {split: _drawn(draw, split, rows[split]) for split in draw.splits}
    return Data(name, {split: Split(which, _count(source, split)) for split, which in rows.items()})


def for_folder(folder: epath.Path, config: Mapping[str, Any], facts: Facts) -> bytes:
    """Returns the card for an artifact's folder: the existing card if a person edited it, otherwise
    a new one. Logs a warning if it keeps an edited card."""
    path = folder / NAME
    if path.exists() and not is_generated(before := path.read_bytes()):
        logging.warning(
            "%s was edited, so it was kept and may not describe the artifact of step %d. To get a "
            "new card, rename the edited one, then write the artifact again.",
            *(path, config["step"]),
        )
        return before
    return text(config, facts).encode()


def is_generated(card: bytes) -> bool:
    """Whether a card is unchanged since a run wrote it."""
    match = _SEALED.fullmatch(card)
    return match is not None and hashlib.sha256(match[1]).hexdigest() == match[2].decode()


def text(config: Mapping[str, Any], facts: Facts) -> str:
    """Returns the card of an artifact, in Markdown.

    Args:
        config: the contents of the artifact's config.json.
        facts: further facts about the run.
    """
    sections = [
        _front_matter(config),
        _summary(config, facts),
        _mixture(config),
        _training_data(config, facts),
        _results(config, facts),
        _made_with(config, facts),
        *(f"## {title}\n\n**[{TO_FILL}]** {what}" for title, what in AUTHORS.items()),
    ]
    body = "\n\n".join(section for section in sections if section) + "\n\n"
    return f"{body}{_SEAL}{hashlib.sha256(body.encode()).hexdigest()} -->\n"


def _front_matter(config: Mapping[str, Any]) -> str:
    # JSON is valid YAML, so json.dumps quotes whatever needs quotes.
    backbone = config["backbone"]
    base = f"base_model: {json.dumps(backbone)}"
    if not _HUB_NAME.fullmatch(backbone):
        base = f"# base_model: {TO_FILL}, the backbone's name on the hub"
    network = "clip" if _is_of_images(config) else "t5"
    tags = ["prompt-tuning", "soft-prompt", network, "jax", config["method"]]
    return "\n".join(
        ["---", f"# license: {TO_FILL}", base, "library_name: mpt_jax", "tags:"]
        + [f"- {json.dumps(tag)}" for tag in dict.fromkeys(tags)]
        + ["---"]
    )


def _summary(config: Mapping[str, Any], facts: Facts) -> str:
    runs = list(config["run_names"])
    subject = f"`{runs[0]}`" if len(runs) == 1 else f"{len(runs)} runs"
    numbers = sum(math.prod(shape) for shape in config["shapes"].values())
    groups = len(set(config["groups"]))
    settings = sorted(config["method_config"].items())
    method = {key.replace("_", " "): _plain(v) for key, v in settings}
    started = (config.get("started_from") or {}).get("artifact_sha256")
    rows = {
        "method": f"`{config['method']}`",
        **method,
        "tasks": ", ".join(f"`{task}`" for task in dict.fromkeys(config["task_names"])),
        "groups that share nothing": groups if groups > 1 else None,
        "numbers in this artifact": f"{numbers:,}",
        "trainable parameters": _thousands(facts.num_trainable),
        "step": config["step"],
        "backbone": f"`{config['backbone']}`",
        "sha256 of its embedding, as bfloat16": f"`{config['embedding_sha256']}`",
        "sha256 of its weights, as bfloat16": _code(config.get("backbone_sha256")),
        "sha256 of the vocabulary": _code(config["vocabulary_sha256"]),
        "sha256 of the image transform": _code(config.get("image_transform_sha256")),
        "sha256 of the prompts it started from": _code(started),
    }
    known = [(name, value) for name, value in rows.items() if value is not None]
    return (
        f"# Soft prompts for {subject}\n\n"
        f"Soft prompts of a {'CLIP' if _is_of_images(config) else 'T5'}, in the format of MPT-JAX. "
        "They work with the backbone and the "
        f"vocabulary whose digests are below, and with no other:\n{_how_to_read(config)}\n\n"
        + _table(("", ""), known)
    )


def _is_of_images(config: Mapping[str, Any]) -> bool:
    return "image_transform_sha256" in config


def _how_to_read(config: Mapping[str, Any]) -> str:
    """Returns a sentence on how to read the prompts, which depends on the method."""
    method = method_from_config(config["method"], config["method_config"], "The artifact")
    runs = Runs(config["task_names"], config["run_names"], config["groups"])
    read = "mpt_jax.artifacts.artifacts.load_artifact(FOLDER)"
    if method.reads_input:
        what = "text" if method.reads_text else "image"
        return (
            f"`{read}` gives the method and its parameters, of which `method.compose` makes the "
            f"prompt of each input. Prompts depend on the {what}, so no run has one that could be "
            "taken alone."
        )
    if not method.parts:
        return f"`{read}` gives the method and its parameters. Runs have no prompts."
    if len(method.parts) > 1 or "" not in method.parts:
        return (
            f"`{read}` gives the method and its parameters. The plain prompts "
            f"({' and '.join(method.parts)}) of each run are below `folded/` in "
            "prompts.safetensors."
        )
    if len(set(method.prompt_lengths(runs))) > 1:
        return (
            f"`{read}.plain()` gives one prompt [positions, width] for each run, each of its own "
            "length."
        )
    return f"`{read}.folded()` gives one prompt [positions, width] for each run."


def _mixture(config: Mapping[str, Any]) -> str:
    """Returns the section with the mixture weights of each run's prompt; '' if config.json records
    none."""
    mixture: Mapping[str, Mapping[str, float]] = config.get("mixture") or {}
    if not mixture:
        return ""
    candidates = list(next(iter(mixture.values())))
    rows = [
        (f"`{run}`", *(f"{weights[c]:.3f}" for c in candidates)) for run, weights in mixture.items()
    ]
    return (
        "## What prompts are mixed from\n\nThe weight of each source prompt in the prompt of each "
        "run, as it is used.\n\n" + _table(("run", *(f"`{c}`" for c in candidates)), rows)
    )


def _training_data(config: Mapping[str, Any], facts: Facts) -> str:
    rows = []
    for run in config["run_names"]:
        if (data := facts.data.get(run)) is None:
            rows.append((f"`{run}`", "unknown", "", "", "", ""))
            continue
        recorded = (config.get("data") or {}).get(data_name(run), {}).get("splits", {})
        for split, part in data.splits.items():
            digest = _code(recorded.get(split, {}).get("sha256")) or ""
            count = _thousands(part.rows) or ""
            rows.append((f"`{run}`", data.source, split, part.rows_of, count, digest))
    header = ("run", "data", "split", "its rows", "number", "sha256 of its texts")
    if not any(row[-1] for row in rows):
        header, rows = header[:-1], [row[:-1] for row in rows]
    trained = [
        f"* `{run}`: trained on {total:,} examples"
        + (f", of which {cut:,} were cut to the limit on lengths." if cut else ".")
        for run, (cut, total) in facts.trained_on.items()
    ]
    parts = ["## Data", _table(header, rows)]
    if facts.data:
        parts.append(
            "Numbers are those of the data set as published, or of the files; preprocessing may "
            "make several examples of a row, or none."
        )
    return "\n\n".join([*parts, *(["\n".join(trained)] if trained else [])])


def _results(config: Mapping[str, Any], facts: Facts) -> str:
    scores: Mapping[str, Any] = config["metrics"].get("scores") or {}
    best: Sequence[int] | None = config["metrics"].get("best_step")
    rows = []
    for run, group in zip(config["run_names"], config["groups"], strict=True):
        count, step = facts.evaluated.get(run), best[group] if best else config["step"]
        for metric, value in _marked(scores.get(run, {})):
            rows.append((f"`{run}`", metric, value, _thousands(count) or "unknown", step))
    lacking = [
        f"* `{run}` was not evaluated, because its task has no {split} split, so its own scores "
        "did not select the step of its prompt."
        for run, split in facts.not_evaluated.items()
    ]
    missing = ["\n".join(lacking)] if lacking else []
    if not rows:
        nothing = "Nothing was measured when this was written."
        return "\n\n".join(["## Results", nothing, *missing])
    note = f"Of the {facts.evaluated_split} split. " if facts.evaluated_split else ""
    if best:
        note += (
            "The step was selected by these scores, so they flatter; test the prompts on others."
        )
    table = _table(("run", "metric", "value", "n (examples)", "step"), rows)
    constant = [f"`{run}`" for run in config["run_names"] if scores.get(run, {}).get(CONSTANT)]
    warning = (
        f"**Every prediction was the same for {', '.join(constant)}**, so the scores are those of "
        "a constant answer."
    )
    notes = [*([note.strip()] if note else []), *([warning] if constant else [])]
    return "\n\n".join(["## Results", *notes, table, *missing])


def _marked(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Returns (metric, formatted value) pairs, sorted by metric. Undefined values are marked."""
    marks = {f"{metric}_undefined" for metric in scores} & scores.keys()
    rows = []
    for metric in sorted(scores.keys() - marks - {CONSTANT}):
        mark = " (undefined)" if scores.get(f"{metric}_undefined") else ""
        rows.append((metric, f"{scores[metric]:.4g}{mark}"))
    return rows


def _made_with(config: Mapping[str, Any], facts: Facts) -> str:
    packages = {**config["versions"], **facts.packages}
    rows = [(name, version) for name, version in sorted(packages.items()) if version]
    rows += [("git revision", f"`{facts.git_revision}`")] if facts.git_revision else []
    return "## Made with\n\n" + _table(("", "version"), rows)


def _rows_of(part: Any) -> str:
    if part.start is None and part.stop is None:
        return part.split
    start, stop = part.start or 0, "the end" if part.stop is None else part.stop
    return f"{part.split}, permuted, places {start} to {stop}"


def _drawn(draw: Any, split: str, rows_of: str) -> str:
    """Returns a description of the rows that a few-shot run draws from a split, given a description
    of the split (`rows_of`)."""
    per_label = " of each label" if draw.per_class else ""
    which = f" ({rows_of})" if rows_of not in ("", split) else ""
    return f"k = {draw.k} rows{per_label} of {split}{which}, draw {draw.seed}"


def _count(source: Any, split: str) -> int | None:
    count = source.num_input_examples(split)
    return None if count is None else int(count)


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _code(value: str | None) -> str | None:
    return None if value is None else f"`{value}`"


def _thousands(number: int | None) -> str | None:
    return None if number is None else f"{number:,}"
