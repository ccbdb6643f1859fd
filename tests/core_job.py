"""One process of a small job of the core alone: the MPT source step with distillation, on made-up
batches. TensorFlow is not imported, so that several of them start in seconds.

    python -m tests.core_job FOLDER STEPS [ADDRESS COUNT INDEX]
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np

from mpt_jax import checkpoints
from mpt_jax.losses import Distillation, Objective
from mpt_jax.partitioning import PjitPartitioner, to_host
from mpt_jax.trainer import Trainer
from mpt_jax.tree import flatten
from tests import tiny

ROWS, RATE = 8, 0.03


class Batches:
    """This process's rows of batches that are a function of the step; counts, as data does."""

    def __init__(self):
        self.step = 0

    def __next__(self) -> dict[str, np.ndarray]:
        rows = np.random.default_rng(self.step).integers(0, 3, ROWS).tolist()
        whole = tiny.batch(rows, seed=self.step)
        share = ROWS // jax.process_count()
        first = share * jax.process_index()
        self.step += 1
        return {name: value[first : first + share] for name, value in whole.items()}

    def state(self) -> bytes:
        return str(self.step).encode()

    def restore(self, position: bytes) -> None:
        self.step = int(position)


def model():
    """Three tasks in one group, distilled from teachers."""
    objective = Objective(distillation=Distillation())
    return tiny.model(objective=objective, optimizer_def=tiny.optimizer(RATE))


def main(folder: str, steps: int) -> None:
    """Trains to a step, going on from what is saved; process 0 writes what was learnt."""
    made, batches = model(), Batches()
    state = tiny.state(made, tiny.params(made))
    saved = checkpoints.Checkpoints(folder)
    position = checkpoints.DataPosition(batches)
    if (found := saved.restore(state)) is not None:
        state = found[0]
        position.restore(found[1]["data"], int(state.step))
    trainer = Trainer(made, state, PjitPartitioner(), jax.random.PRNGKey(0))
    while trainer.step < steps:
        trainer.train(next(batches))
    trainer.read_metrics()
    saved.save(trainer.state, {"data": position.at(steps, steps)})
    saved.close()
    learnt = flatten(to_host(trainer.state.trainable))
    if jax.process_index() == 0:
        np.savez(Path(folder) / f"learnt_{steps}.npz", **learnt)


if __name__ == "__main__":
    given_folder, given_steps, *others = sys.argv[1:]
    if others:
        address, count, index = others
        jax.distributed.initialize(address, int(count), int(index))
    main(given_folder, int(given_steps))
