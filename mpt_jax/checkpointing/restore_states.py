"""Train states that a restore configuration names, for evaluation and inference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
from absl import logging
from etils import epath

from mpt_jax.checkpointing import checkpoint_config, checkpoints, fingerprint
from mpt_jax.models.encoder_decoder import PromptedEncoderDecoder
from mpt_jax.training import initialization
from mpt_jax.training.partitioning import PjitPartitioner
from mpt_jax.training.state import TrainState, create_train_state


def states(
    model: PromptedEncoderDecoder,
    origins: initialization.Origins,
    partitioner: PjitPartitioner,
    cfg: checkpoint_config.RestoreCheckpointConfig,
) -> Iterator[TrainState]:
    """The states that a restore configuration names, oldest first.

    Raises:
        FileNotFoundError: no such checkpoint; lists those there are.
        ValueError: a checkpoint of other tasks, another backbone or another method, with both
            values of what differs; neither checkpoint nor artifact named.
    """
    if not cfg.path and not origins.artifact:
        raise ValueError(
            "There is nothing to evaluate: set CHECKPOINT_PATH to a checkpoint of a run, or "
            "INITIAL_ARTIFACT to a prompt artifact."
        )
    loaded = initialization.initialize_params(model, origins, jax.random.PRNGKey(0))
    state = create_train_state(model, loaded.params, partitioner)
    if not cfg.path:
        yield state
    ours = fingerprint.model_fingerprint(model, loaded)
    for folder, step in _wanted(cfg):
        saved = checkpoints.Checkpoints(folder, read_only=True)
        path = saved.path(step)
        # First, because shapes may differ for no other reason than these.
        fingerprint.check_can_restore(ours, saved.meta(step)["identity"], path)
        found = saved.restore(state, step)
        assert found is not None
        logging.info("Read %s.", path)
        yield found[0]


def _wanted(cfg: checkpoint_config.RestoreCheckpointConfig) -> list[tuple[str, int]]:
    """(MODEL_DIR, step) of every checkpoint that a configuration names."""
    paths: Sequence[str] = [cfg.path] if isinstance(cfg.path, str) else list(cfg.path)
    wanted = []
    for path in paths if cfg.path else ():
        folder = epath.Path(path)
        named = checkpoints.NAME.fullmatch(folder.name)
        folder = folder.parent if named else folder
        steps = checkpoints.saved_steps(folder)
        if named and cfg.mode == "specific":
            chosen = [int(named[1])]
        else:
            chosen = steps if cfg.mode == "all" else steps[-1:]
        if not chosen or not set(chosen) <= set(steps) or bool(named) != (cfg.mode == "specific"):
            there = ", ".join(str(folder / f"{checkpoints.PREFIX}_{step}") for step in steps)
            raise FileNotFoundError(
                f"No checkpoint of a run at {path} (mode {cfg.mode!r}: 'specific' names a "
                f"{checkpoints.PREFIX}_<step>, the others a MODEL_DIR). There are: "
                f"{there or 'none'}."
            )
        wanted += [(str(folder), step) for step in chosen]
    return wanted
