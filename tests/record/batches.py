"""Batches of the source mixture on the toy suite, written to the current folder.

Started by behavior.py: batches leave no files by themselves, so this needs the Python API.
"""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import gin
import numpy as np
from behavior import PACKED, SIX
from names import API


def api(name: str) -> Any:
    """Something of the Python API."""
    module, _, attribute = API[name].partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


def write_batches() -> None:
    """Writes the first three training batches, in every manner, and the first of evaluation."""
    api("install")()
    script = api("train_script")
    kinds = {
        "unpacked": ([], {}),
        "packed": (["runs/packed"], PACKED),
        "by_length": (["runs/by_length"], {"LENGTH_BUCKETS": {"inputs": [16, 32], "targets": [4]}}),
    }
    for kind, (files, bindings) in kinds.items():
        names = [f"gin/{name}.gin" for name in ("mpt_source", "tiny", *files)]
        given = [f"{name} = {value!r}" for name, value in {**SIX, **bindings}.items()]
        with api("as_main")(script):
            api("parse")(names, given)
            configs = {
                scope: gin.query_parameter(f"train.{scope}_dataset_cfg").scoped_configurable_fn()
                for scope in ("train", "train_eval")
            }
            converter = gin.get_configurable("MODEL/gin.macro")().FEATURE_CONVERTER_CLS
        found = {}
        training = api("train_iterator")(configs["train"], converter)
        for number, batch in enumerate(itertools.islice(training, 3)):
            found |= {f"train/{number}/{name}": value for name, value in batch.items()}
        evaluation = api("eval_batches")(configs["train_eval"], converter, num_batches=1)
        for task, start in evaluation.items():
            if not task.startswith("mixture_"):  # all tasks together, by a hash of arguments
                (batch,) = itertools.islice(start(), 1)
                found |= {f"eval/{task}/{name}": value for name, value in batch.items()}
        np.savez(f"{kind}.npz", **found)


if __name__ == "__main__":
    write_batches()
