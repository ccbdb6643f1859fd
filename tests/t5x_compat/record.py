"""Recorder of every member that T5X uses on this library's objects, while T5X runs.

`--gin_file=tests/t5x_compat/record.gin` imports this module in an otherwise normal run. Members
that T5X's files read, set or call are written as JSON to the file that RECORD names.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
from pathlib import Path
from typing import Any

from mpt_jax.data import feature_converter
from mpt_jax.models import encoder_decoder
from mpt_jax.t5x_compat import train_state_adapter
from mpt_jax.training import selection

T5X = str(Path(sys.modules["t5x"].__file__ or "").parent)
OBJECTS = {
    "model": encoder_decoder.PromptedEncoderDecoder,
    "train state": train_state_adapter.HostState,
    "initializer": train_state_adapter.TrainStateInitializer,
    "feature converter": feature_converter.PromptFeatureConverter,
    "action": selection.SelectBest,
    "save hook": train_state_adapter.ArtifactHook,
}
touched: dict[str, set[str]] = {name: set() for name in OBJECTS}


def from_t5x() -> bool:
    """Whether T5X's code called the function that calls this."""
    return sys._getframe(2).f_code.co_filename.startswith(T5X)


def spy(kind: str, cls: type) -> None:
    """Records what T5X reads, sets and calls on instances of a class."""
    read, write, call = cls.__getattribute__, cls.__setattr__, cls.__dict__.get("__call__")

    def noted_read(self: Any, name: str) -> Any:
        value = read(self, name)  # absent attributes are not recorded
        if from_t5x():
            touched[kind].add(name)
        return value

    def noted_write(self: Any, name: str, value: Any) -> None:
        if from_t5x():
            touched[kind].add(f"{name} =")
        write(self, name, value)

    cls.__getattribute__, cls.__setattr__ = noted_read, noted_write  # type: ignore[assignment]
    if call is not None:

        def noted_call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if from_t5x():
                touched[kind].add("()")
            return call(self, *args, **kwargs)

        cls.__call__ = noted_call  # type: ignore[attr-defined]


def spy_on_arguments(kind: str, cls: type, ours: tuple[str, ...]) -> None:
    """Records a constructor's argument names, except those that this library's gin files bind."""
    make = cls.__init__

    def noted(self: Any, *args: Any, **kwargs: Any) -> None:
        assert not args, f"positional arguments for a {kind}: {args}"
        touched[kind].update(f"({name}=)" for name in kwargs if name not in ours)
        make(self, *args, **kwargs)

    cls.__init__ = noted  # type: ignore[misc]


def write() -> None:
    """Writes the recorded members."""
    found = {kind: sorted(names) for kind, names in touched.items()}
    Path(os.environ["RECORD"]).write_text(json.dumps(found, indent=1))


for kind, cls in OBJECTS.items():
    spy(kind, cls)
spy_on_arguments("initializer", train_state_adapter.TrainStateInitializer, ("origins",))
spy_on_arguments(
    "feature converter",
    feature_converter.PromptFeatureConverter,
    ("runs", "on_overlong", "prompt_length"),
)
atexit.register(write)
