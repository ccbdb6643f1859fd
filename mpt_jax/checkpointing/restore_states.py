"""Train states for evaluation and inference, from checkpoints or a prompt artifact."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax
from absl import logging
from etils import epath

from mpt_jax.checkpointing import checkpoint_config, checkpoints, fingerprint
from mpt_jax.models.model import Model
from mpt_jax.training import initialization
from mpt_jax.training.partitioning import PjitPartitioner
from mpt_jax.training.state import TrainState, create_train_state


def states(
    model: Model,
    origins: initialization.Origins,
    partitioner: PjitPartitioner,
    cfg: checkpoint_config.RestoreCheckpointConfig,
) -> Iterator[TrainState]:
    """Yields the states of the checkpoints that a restore configuration names.

    The states are in the order of the paths; those of one MODEL_DIR are oldest first. If the
    configuration names no checkpoint, yields the state of the prompt artifact in `origins`, or of
    its backbone if the method has no prompt.

    Raises:
        FileNotFoundError: a checkpoint does not exist; the message lists the existing ones.
        ValueError: a checkpoint was trained with other tasks, another backbone or another method,
            and the message shows both values of each difference; or neither a checkpoint nor an
            artifact is named.
        OSError: a checkpoint cannot be read.
    """
    if not cfg.path and not origins.artifact and model.prompt.labels:
        raise ValueError(
            "No prompts to read: CHECKPOINT_PATH and INITIAL_ARTIFACT are both empty. Set "
            "CHECKPOINT_PATH to a checkpoint, or INITIAL_ARTIFACT to a prompt artifact."
        )
    if not cfg.path:
        model = model.for_inference()
        if not origins.artifact:
            logging.info("No prompt and no checkpoint: reading the backbone %s.", origins.backbone)
    elif not model.prompt.needs_artifact:  # the checkpoint has all prompts
        origins = dataclasses.replace(origins, artifact=None)
    loaded = initialization.initialize_params(
        model, origins, jax.random.PRNGKey(0), evaluates_artifact=not cfg.path
    )
    state = create_train_state(model, loaded.params, partitioner)
    if not cfg.path:
        yield state
    ours = fingerprint.model_fingerprint(model, loaded)
    for folder, step in _wanted(cfg):
        saved = checkpoints.Checkpoints(folder, read_only=True)
        path = saved.path(step)
        # Checked first, because differing shapes are only a consequence of these.
        fingerprint.check_can_restore(ours, saved.meta(step).get("identity", {}), path)
        restored = saved.restore(state, step)
        assert restored is not None
        logging.info("Read the checkpoint %s.", path)
        yield restored[0]


def _wanted(cfg: checkpoint_config.RestoreCheckpointConfig) -> list[tuple[str, int]]:
    """Returns (MODEL_DIR, step) of every checkpoint that a configuration names."""
    paths: Sequence[str] = [cfg.path] if isinstance(cfg.path, str) else list(cfg.path)
    wanted = []
    for path in paths if cfg.path else ():
        folder = epath.Path(path)
        match = checkpoints.NAME.fullmatch(folder.name)
        folder = folder.parent if match else folder
        steps = checkpoints.saved_steps(folder)
        if match and cfg.mode == "specific":
            selected = [int(match[1])]
        else:
            selected = steps if cfg.mode == "all" else steps[-1:]
        is_specific = cfg.mode == "specific"
        _check_not_an_artifact(path)
        if not selected or not set(selected) <= set(steps) or bool(match) != is_specific:
            existing = ", ".join(str(folder / f"{checkpoints.PREFIX}_{step}") for step in steps)
            raise FileNotFoundError(
                f"No training checkpoint at {path} for mode {cfg.mode!r}. Set CHECKPOINT_PATH to "
                f"{'a checkpoint folder' if is_specific else 'a MODEL_DIR with checkpoints'}, or "
                "change RestoreCheckpointConfig.mode ('specific' reads a checkpoint folder, the "
                f"other modes a MODEL_DIR). Existing checkpoints: {existing or 'none'}."
            )
        wanted += [(str(folder), step) for step in selected]
    return wanted


def _check_not_an_artifact(path: str) -> None:
    if (epath.Path(path) / "prompts.safetensors").exists():
        raise FileNotFoundError(
            f"CHECKPOINT_PATH = {str(path)!r} is a prompt artifact, not a training checkpoint. Set "
            f"INITIAL_ARTIFACT to {str(path)!r}, and leave CHECKPOINT_PATH empty."
        )
