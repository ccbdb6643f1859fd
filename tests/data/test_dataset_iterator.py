"""Iteration over datasets that call Python functions: errors, and the end of the process."""

from __future__ import annotations

import threading
import time

import pytest
import tensorflow as tf

from mpt_jax.data.dataset_iterator import DatasetIterator
from tests.fixtures.processes import run_python


def calling(function, size=100):
    """A dataset that reads ahead, and calls a Python function for each number."""
    numbers = tf.data.Dataset.range(size)
    call = lambda i: tf.numpy_function(function, [i], tf.int64, stateful=False)  # noqa: E731
    return numbers.map(call).prefetch(50)


# Ends while a thread of tf.data calls Python, after an error that still refers to the iterator.
ENDING = """
import time
import tensorflow as tf
from mpt_jax.data.dataset_iterator import DatasetIterator
def slow(i):
    time.sleep(0.02)
    return i
def mapped(i):
    with tf.control_dependencies([tf.debugging.Assert(i != 1, ["wrong"])]):
        return tf.numpy_function(slow, [i], tf.int64, stateful=False)
iterator = DatasetIterator(tf.data.Dataset.range(100).map(mapped).prefetch(50))
next(iterator)
try:
    next(iterator)
except ValueError as error:
    kept = error
print("read", flush=True)
"""


def test_process_ends_while_a_thread_reads_ahead():
    """Without the exit function, this process never ends."""
    child = run_python("-c", ENDING, fresh=True, timeout=100)
    assert child.stdout == "read\n"


def test_stop_ends_reading_ahead():
    calls = []

    def count(i):
        calls.append(threading.current_thread())
        time.sleep(0.005)
        return i

    iterator = DatasetIterator(calling(count))
    assert next(iterator) == 0
    iterator.stop()
    number = len(calls)
    time.sleep(0.05)
    assert len(calls) == number < 50
    with pytest.raises(StopIteration):
        next(iterator)


def test_failed_assertion_raises_its_message():
    def checked(i):
        check = tf.debugging.Assert(i < 1, [tf.strings.format("The number is {}. Lower it.", i)])
        with tf.control_dependencies([check]):
            return tf.identity(i)

    iterator = DatasetIterator(tf.data.Dataset.range(3).map(checked))
    next(iterator)
    with pytest.raises(ValueError, match=r"^The number is 1. Lower it.$"):
        next(iterator)
