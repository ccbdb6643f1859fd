"""SeqIO registration of `toy_many` in other orders: importing this module registers the tasks.

    toy_many_order1_1 ... toy_many_order9_4     twelve classes, three in each of four tasks

The toy image tasks have `toy_many_1` ... `toy_many_4`, in the order of the labels.
"""

from __future__ import annotations

import numpy as np

from mpt_jax.tasks import incremental
from mpt_jax.tasks.toy_image_tasks import TASKS, ToyImages

NAME, CLASSES_OF_TASK = "toy_many", 3
ORDERS = 10  # with that of the labels


def sequence(order: int) -> list[str]:
    """Returns the tasks of the sequence with order 0 (that of the labels) to `ORDERS` - 1.

    Raises:
        ValueError: there is no such order.
    """
    if not 0 <= order < ORDERS:
        raise ValueError(
            f"{NAME} has the orders 0 to {ORDERS - 1}, and {order} was asked for. Lower --seeds."
        )
    number = len(TASKS[NAME].class_names) // CLASSES_OF_TASK
    prefix = NAME if order == 0 else f"{NAME}_order{order}"
    return [f"{prefix}_{task}" for task in range(1, number + 1)]


def register() -> None:
    """Registers the tasks of all orders except that of the labels."""
    task = TASKS[NAME]
    source, classes = ToyImages(task), len(task.class_names)
    sizes = incremental.task_sizes(classes, 0, CLASSES_OF_TASK)
    for order in range(1, ORDERS):
        chosen = np.random.default_rng(order).permutation(classes).tolist()
        incremental.register(
            f"{NAME}_order{order}", source, sizes, chosen, templates=task.templates
        )


register()
