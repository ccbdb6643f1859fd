"""Iterator over a dataset whose graph calls Python functions, as decoding an image does.

A thread of tf.data that needs Python while the interpreter shuts down never returns, and the
process hangs. So all iterators stop before the shutdown.
"""

from __future__ import annotations

import atexit
import functools
import re
import weakref
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

_OPEN: weakref.WeakSet[DatasetIterator] = weakref.WeakSet()


class DatasetIterator(Iterator[Any]):
    """Iterator over a dataset. A failed assertion in the graph raises a ValueError with its message
    only."""

    def __init__(self, dataset: tf.data.Dataset):
        self._iterator: Any = iter(dataset)
        _OPEN.add(self)

    @functools.cached_property
    def checkpoint(self) -> tf.train.Checkpoint:
        """TensorFlow's checkpoint of the position."""
        return tf.train.Checkpoint(iterator=self._iterator)

    def __next__(self) -> Any:
        problem = None
        try:
            return next(self._iterator)
        except tf.errors.InvalidArgumentError as error:
            problem = plain_message(error)
        # Raised here, because the error's traceback would keep TensorFlow's iterator alive.
        raise ValueError(problem)

    def stop(self) -> None:
        """Ends the iteration, and waits until no thread reads ahead."""
        self.__dict__.pop("checkpoint", None)
        self._iterator = iter(())


@atexit.register
def _stop_all() -> None:
    for iterator in list(_OPEN):
        iterator.stop()


def plain_message(error: tf.errors.InvalidArgumentError) -> str:
    """Returns the message of a failed graph assertion, without the text that TensorFlow adds.

    The message of any other error is returned unchanged.
    """
    match = re.search(r"assertion failed: \[(.*?)\]\s*\n", str(error), re.DOTALL)
    return match.group(1) if match else str(error)
