"""What makes a run this run: saved with every checkpoint, and compared before one is used.

Shapes alone would let a checkpoint of other tasks, another backbone or another loss pass in
silence. What a user may change half-way (learning rates, clipping) is compared too, and logged.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from absl import logging

from mpt_jax.artifacts import artifacts
from mpt_jax.core.comparison import check_same, differences
from mpt_jax.core.old_names import current_keys
from mpt_jax.core.tree import flatten
from mpt_jax.models.encoder_decoder import FROZEN, PromptedEncoderDecoder
from mpt_jax.training.initialization import InitialParams

# What may change between two starts of one run.
MAY_CHANGE = ("optimizer",)
FROZEN_PROMPTS = "frozen_prompts_sha256"

Fingerprint = dict[str, Any]


def model_fingerprint(model: PromptedEncoderDecoder, loaded: InitialParams) -> Fingerprint:
    """What predictions depend on beside the values of a checkpoint. JSON values."""
    found = {
        "method": model.prompt.name,
        "method_config": model.prompt.config(),
        "run_names": list(model.runs.run_names),
        "groups": list(model.runs.group_of_row),
        "embedding_sha256": loaded.embedding_sha256,
        "vocabulary_sha256": loaded.vocabulary_sha256,
    }
    labels = flatten(model.label_tree(loaded.params))
    frozen = {
        name: leaf
        for name, leaf in flatten(loaded.params).items()
        if name.startswith("prompt/") and labels[name] == FROZEN
    }
    # Prompts that do not learn are in no checkpoint.
    return found | ({FROZEN_PROMPTS: artifacts.digest(frozen)} if frozen else {})


def run_fingerprint(
    model: PromptedEncoderDecoder, loaded: InitialParams, batch_size: int, seed: int
) -> Fingerprint:
    """What a training run and its resumption must have in common, and its optimizer."""
    return model_fingerprint(model, loaded) | {
        "learning": sorted(set(flatten(model.label_tree(loaded.params)).values())),
        "objective": repr(model.objective),
        "teacher_sha256": loaded.teacher_sha256,
        "artifact_sha256": loaded.artifact_sha256,
        "start_from": loaded.start_from,
        "batch_size": batch_size,
        "random_seed": seed,
        "optimizer": _optimizer(model.optimizer_def),
    }


def check_can_resume(ours: Fingerprint, saved: Fingerprint, model_dir: str) -> None:
    """Checks that a run has the configuration it was saved with, and logs what may change.

    Raises:
        ValueError: both values of everything that differs.
    """
    saved = current_keys(saved)
    strict = [name for name in _known(ours, saved) if name not in MAY_CHANGE]
    advice = f"Choose another MODEL_DIR, or remove {model_dir}."
    check_same(saved, ours, strict, what=f"The run in {model_dir}", advice=advice)
    if changed := differences(saved, ours, MAY_CHANGE):
        logging.warning("The run in %s resumes with changed settings: %s.", model_dir, changed)


def check_can_restore(ours: Fingerprint, saved: Fingerprint, path: Any) -> None:
    """Checks that this model reads a checkpoint as what it was saved as.

    Args:
        ours: of the model that reads, `of_model`.
        saved: of the run that saved.
        path: where it was saved.

    Raises:
        ValueError: both values of everything that differs.
    """
    saved = current_keys(saved)
    advice = (
        "Give the tasks in the order, and the backbone and method, that it was trained with; its "
        "MODEL_DIR has them in config.gin."
    )
    check_same(saved, ours, _known(ours, saved), what=f"{path}", advice=advice)


def _known(ours: Fingerprint, saved: Fingerprint) -> list[str]:
    """What can be compared: earlier versions did not save a digest of prompts that do not learn."""
    return [name for name in ours if name in saved or name != FROZEN_PROMPTS]


def _optimizer(optimizer: Any) -> dict[str, Any]:
    """The optimizer's settings without the length of training, which may always be extended."""
    found = {
        field.name: getattr(optimizer, field.name)
        for field in dataclasses.fields(optimizer)
        if field.name not in ("labels", "runs", "rows", "schedule_steps", "learning_rates")
    }
    rates = {
        f"{label}.{field.name}": getattr(schedule, field.name)
        for label, schedule in optimizer.learning_rates.items()
        if dataclasses.is_dataclass(schedule)
        for field in dataclasses.fields(schedule)
        if field.name != "total_steps"
    }
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in (found | rates).items()
    }
