"""Configuration fingerprint, saved with every checkpoint and verified on restore.

Shapes alone cannot reveal that a checkpoint was trained on other tasks, another backbone or another
loss. Settings that a user may change between starts (learning rates, clipping) are also compared,
but changes to them are only logged.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from absl import logging

from mpt_jax.artifacts import artifacts, compatibility
from mpt_jax.artifacts.backbone_digest import CONFIG_FIELD, FIELD, backbone_config
from mpt_jax.core.comparison import check_same, data_changes, differences
from mpt_jax.core.old_names import current_keys
from mpt_jax.core.tree import flatten
from mpt_jax.models.model import FROZEN, Model
from mpt_jax.training.initialization import InitialParams

# Entries that may change between two starts of a job.
DROPOUT = "dropout_rate"
MAY_CHANGE = ("optimizer", DROPOUT)
DATA = "data"  # compared by `_check_data`
FROZEN_PROMPTS = "frozen_prompts_sha256"

Fingerprint = dict[str, Any]


def model_fingerprint(model: Model, loaded: InitialParams) -> Fingerprint:
    """Returns all that predictions depend on, except a checkpoint's values, as JSON values."""
    entries = {
        "method": model.prompt.name,
        "method_config": model.prompt.config(),
        "run_names": list(model.runs.run_names),
        "groups": list(model.runs.group_of_row),
        CONFIG_FIELD: backbone_config(model.backbone_config),
        **loaded.digests,
    }
    labels = flatten(model.label_tree(loaded.params))
    frozen = {
        name: leaf
        for name, leaf in flatten(loaded.params).items()
        if name.startswith("prompt/") and labels[name] == FROZEN
    }
    # Checkpoints do not contain frozen prompts.
    return entries | ({FROZEN_PROMPTS: artifacts.digest(frozen)} if frozen else {})


def run_fingerprint(
    model: Model,
    loaded: InitialParams,
    batch_size: int,
    seed: int,
    data: Mapping[str, Any],
) -> Fingerprint:
    """Returns the model fingerprint and all else to compare when a job resumes, as JSON values.

    `data` is the record of the job's data, from `mpt_jax.data.records.of_job`.
    """
    return model_fingerprint(model, loaded) | {
        "learning": sorted(set(flatten(model.label_tree(loaded.params)).values())),
        "objective": repr(model.objective),
        "teacher_sha256": loaded.teacher_sha256,
        "artifact_sha256": loaded.artifact_sha256,
        "start_from": loaded.start_from,
        "batch_size": batch_size,
        "random_seed": seed,
        "optimizer": _optimizer(model.optimizer_def),
        DROPOUT: model.dropout_rate,
        **model.training_settings,
        DATA: dict(data),
    }


def check_can_resume(ours: Fingerprint, saved: Fingerprint, model_dir: str) -> None:
    """Checks that a job has the configuration it was saved with; logs changes that are allowed.

    Raises:
        ValueError: the configurations differ; the message shows both values of each difference.
    """
    saved = current_keys(saved)
    if DROPOUT in ours:
        saved = {DROPOUT: 0.0, **saved}  # the default of versions that did not record it
    ours, saved = _with_config_fields(ours), _with_config_fields(saved)
    names = _known(ours, saved, model_dir)
    strict = [name for name in names if name not in (*MAY_CHANGE, DATA)]
    advice = "Restore the saved values to resume it, or choose another MODEL_DIR for a new job."
    check_same(saved, ours, strict, what=f"The job in {model_dir}", advice=advice)
    _check_data(ours, saved, model_dir)
    if changed := differences(saved, ours, MAY_CHANGE):
        logging.warning("The job in %s resumes with changed settings: %s.", model_dir, changed)


def _check_data(ours: Fingerprint, saved: Fingerprint, model_dir: str) -> None:
    """Raises ValueError if a job's data has changed since it was saved."""
    if DATA not in saved:
        logging.warning(
            "The job in %s was saved by a version of MPT-JAX that did not record its data, so "
            "changes to the data cannot be detected. That version also split the files of tasks "
            "with data= by another rule. If a task uses data=, or a file has changed, choose "
            "another MODEL_DIR.",
            model_dir,
        )
    elif changes := data_changes(saved[DATA], ours[DATA]):
        raise ValueError(
            f"The data of the job in {model_dir} has changed since it was saved ({changes}). "
            "Restore the data to resume the job, or choose another MODEL_DIR to train on the new "
            "data from the start."
        )


def check_can_restore(ours: Fingerprint, saved: Fingerprint, path: Any) -> None:
    """Checks that a checkpoint was saved by a job with the same model.

    Args:
        ours: the fingerprint of the model that reads the checkpoint, from `model_fingerprint`.
        saved: the fingerprint of the job that saved the checkpoint.
        path: the path of the checkpoint, to show in the error.

    Raises:
        ValueError: the models differ; the message shows both values of each difference.
    """
    ours, saved = _with_config_fields(ours), _with_config_fields(current_keys(saved))
    advice = (
        "Use the tasks (in the same order), backbone and method that the checkpoint was trained "
        "with. They are listed in config.gin in its MODEL_DIR."
    )
    check_same(saved, ours, _known(ours, saved, path), what=f"{path}", advice=advice)


def _known(ours: Fingerprint, saved: Fingerprint, path: Any) -> list[str]:
    """Returns the names of the entries to compare.

    Omits the digest of frozen prompts and the backbone's configuration if `saved` lacks them
    because an earlier version saved it. Also omits the digest of the backbone's weights if either
    side has none.
    """
    config = {name for name in ours if name.startswith(f"{CONFIG_FIELD}.")}
    optional = ({FROZEN_PROMPTS} | config) - saved.keys()
    if None in (ours.get(FIELD), saved.get(FIELD)):
        optional.add(FIELD)
        if ours.get(FIELD) is not None:
            logging.warning("%s", compatibility.embedding_only(f"{path}"))
    elif config and not config & saved.keys():
        logging.warning("%s", compatibility.weights_only(f"{path}"))
    return [name for name in ours if name not in optional]


def _with_config_fields(fingerprint: Fingerprint) -> Fingerprint:
    """Returns a fingerprint with one entry for each field of the backbone's configuration, so that
    errors show only those that differ."""
    fields = fingerprint.get(CONFIG_FIELD) or {}
    rest = {name: value for name, value in fingerprint.items() if name != CONFIG_FIELD}
    return rest | {f"{CONFIG_FIELD}.{name}": value for name, value in fields.items()}


def _optimizer(optimizer: Any) -> dict[str, Any]:
    """Returns the optimizer's settings, except the training length, which the user may extend."""
    settings = {
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
    return {name: _json_value(value) for name, value in (settings | rates).items()}


def _json_value(value: Any) -> Any:
    """Returns a setting as a JSON value: a function, such as the optimizer's rule, by its name, and
    the arguments that are bound to it."""
    if isinstance(value, functools.partial):
        given = [repr(x) for x in value.args]
        given += [f"{name}={x!r}" for name, x in value.keywords.items()]
        return f"{_json_value(value.func)}({', '.join(given)})"
    if callable(value):
        return getattr(value, "__name__", repr(value))
    return list(value) if isinstance(value, tuple) else value
