"""TensorFlow starts without Keras, which works as usual when it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.fixtures.processes import ROOT

PACKAGES = {"keras", "matplotlib.pyplot", "scipy.stats", "sklearn"}
PRINT = f"import sys; print(*(set('{' '.join(PACKAGES)}'.split()) & sys.modules.keys()))"


def loaded(code):
    """Returns the packages of `PACKAGES` that a process has loaded after it ran `code`."""
    command = [sys.executable, "-c", f"{code}; {PRINT}"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(ended.stdout.split())


def test_trainer_and_tasks_load_neither_keras_nor_packages_of_metrics():
    code = "import mpt_jax.train, mpt_jax.tasks.toy, mpt_jax.tasks.toy_images"
    assert not loaded(f"{code}, tensorflow, tensorflow_text")


@pytest.mark.parametrize(
    "use",
    [
        "tf.keras.optimizers.Adam(0.1)",
        "tf_text.keras.layers.ToDense(0)(tf.ragged.constant([[1.0], []]))",
        "import keras; keras.Input([1])",
    ],
)
def test_keras_is_loaded_when_it_is_used(use):
    code = f"import mpt_jax, tensorflow as tf, tensorflow_text as tf_text; {use}"
    assert loaded(code) >= {"keras"}


def test_keras_can_be_imported_before_tensorflow():
    assert loaded("import mpt_jax, keras, tensorflow as tf; tf.keras.Input([1])") >= {"keras"}
