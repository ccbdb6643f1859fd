"""Export of the scores of images, lowered by `jax.export` for several platforms at once.

The features of all classes are computed here and are arguments of the function, so the text encoder
is not part of the export. With lanes, a second function scores the classes of all lanes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import export
from safetensors.numpy import save

import mpt_jax
from mpt_jax.core import schema
from mpt_jax.core.tree import unflatten
from mpt_jax.models.class_scores import FEATURES
from mpt_jax.models.classifier import PromptedClassifier
from mpt_jax.prompts.sites import IMAGE
from mpt_jax.runtime.files import new_folder
from mpt_jax.serving.export.loading import (
    BACKBONE,
    CONFIG,
    FORMAT,
    IMAGES,
    PROMPTS,
    SCORE,
    SCORE_SEEN,
    SEAL,
    SEEN,
)
from mpt_jax.serving.export.writing import README, WITHOUT_WEIGHTS, Settings, check_new, flat
from mpt_jax.serving.predict.image_server import ImageServer
from mpt_jax.serving.predict.lane_artifacts import seen_classes

CLASSES = "class_features"


def write_images(folder: Path, server: ImageServer, settings: Settings) -> dict[str, Any]:
    """Writes an exported folder.

    Args:
        folder: the folder to create. If writing fails, it is not created.
        server: the server to export.
        settings: the settings of the export; lengths of texts are not used.

    Returns:
        The contents of the folder's config.json.

    Raises:
        FileExistsError: the folder already exists.
    """
    check_new(folder)
    params = server.params
    backbone = {name: x for name, x in params.items() if name not in ("prompt", FEATURES)}
    prompts = params["prompt"]
    if FEATURES in params:  # in place of the contexts
        tokens = {IMAGE: prompts[IMAGE]} if IMAGE in prompts else {}
        prompts = {**tokens, CLASSES: params[FEATURES]["table"]}
    arguments = {"backbone": flat(backbone), "prompts": flat(prompts)}
    functions: dict[str, Any] = {SCORE: server.model.score_batch}
    if isinstance(server.model, PromptedClassifier):
        functions[SCORE_SEEN] = server.model.score_seen_batch
    weights = save(arguments["backbone"])
    files = {PROMPTS: save(arguments["prompts"])}
    for name, score in functions.items():
        files[name] = bytes(_lowered(score, server, arguments, settings).serialize())
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    tasks = server.inputs.tasks
    record = {
        "format": FORMAT,
        "names": list(server.names),
        IMAGES: {
            "transform": server.inputs.transform,
            "classes": {
                name: list(task.names) for name, task in zip(server.names, tasks, strict=True)
            },
            "multi_label": [
                name for name, task in zip(server.names, tasks, strict=True) if task.multi_label
            ],
            **_seen(server),
        },
        "platforms": list(settings.platforms),
        **server.digests,
        "files_sha256": digests | {BACKBONE: hashlib.sha256(weights).hexdigest()},
        "versions": {"mpt_jax": mpt_jax.__version__, "jax": jax.__version__},
    }
    record = schema.sealed(record, SEAL)
    with new_folder(folder) as scratch:
        for name, data in (files | ({BACKBONE: weights} if settings.weights else {})).items():
            (scratch / name).write_bytes(data)
        (scratch / CONFIG).write_text(json.dumps(record, indent=2) + "\n")
        (scratch / README).write_text(_readme(record, settings.weights))
    return record


def _seen(server: ImageServer) -> dict[str, Any]:
    """Returns the sequence of each lane, and the lane and name of each class that `SCORE_SEEN`
    scores; nothing without lanes."""
    if not isinstance(server.model, PromptedClassifier):
        return {}
    classes = [[server.names[row], name] for row, name in seen_classes(server.model)]
    return {SEEN: {"sequence": list(server.model.runs.group_of_row), "classes": classes}}


def _lowered(
    function: Callable[..., Any],
    server: ImageServer,
    arguments: dict[str, Any],
    settings: Settings,
) -> export.Exported:
    """Returns a score function, lowered for any number of images."""
    size = server.inputs.transform["size"]

    def score(backbone, prompts, images, rows):
        sites = {name: x for name, x in prompts.items() if name != CLASSES}
        params = {**unflatten(backbone), "prompt": unflatten(sites)}
        if CLASSES in prompts:
            params[FEATURES] = {"table": prompts[CLASSES]}
        return function(params, {"image": images, "task_ids": rows})

    (batch,) = export.symbolic_shape("b", constraints=["b >= 1"])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    return export.export(jax.jit(score), platforms=tuple(settings.platforms))(
        shapes["backbone"],
        shapes["prompts"],
        jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
    )


def _readme(config: dict[str, Any], weights: bool) -> str:
    """Returns the README of an exported folder, which explains how to call the function."""
    transform, tasks = config[IMAGES]["transform"], len(config["names"])
    size = transform["size"]
    lanes = SEEN in config[IMAGES]
    title = "An image encoder with lanes" if lanes else "A CLIP with prompts"
    contents = "the lanes and heads"
    if not lanes:
        contents = f"the features of all classes (`{CLASSES}`), and the image tokens, if any"
    return f"""# {title} of {tasks} tasks, exported by MPT-JAX

StableHLO of {"two functions" if lanes else "one function"} for {", ".join(config["platforms"])}, as
`jax.export` writes it. It needs only JAX, flatbuffers and safetensors, not MPT-JAX.

| file | what |
|---|---|
| `{SCORE}` | the log probability of every class of an image's task, in nats |
{_SEEN_ROW if lanes else ""}\
| `{BACKBONE}` | the weights of the image encoder |
| `{PROMPTS}` | {contents} |
| `{CONFIG}` | names of tasks and classes, the image transform; sha256 of all files |
{"" if weights else WITHOUT_WEIGHTS}
A call takes any number of images, uint8 [b, {size}, {size}, 3], each with the row of its task.
Row k is the task `names[k]`, and column c of its scores is the class
`{IMAGES}.classes[names[k]][c]`; other columns are minus infinity. Images are resized as
`{IMAGES}.transform` says ({transform["mode"]}, bicubic with antialiasing, as Pillow does). The
function does not check rows; `mpt_jax.serving.export.load` does.
{_SEEN_README if lanes else ""}
```python
import json

import jax
import numpy as np
from jax import export
from safetensors.flax import load_file

config = json.load(open("{CONFIG}"))
backbone, prompts = load_file("{BACKBONE}"), load_file("{PROMPTS}")
function = export.deserialize(bytearray(open("{SCORE}", "rb").read()))
score = jax.jit(function.call)

images = np.zeros((2, {size}, {size}, 3), np.uint8)
rows = np.array([0, {tasks - 1}], np.int32)
scores = score(backbone, prompts, images, rows)
```
"""


_SEEN_ROW = f"| `{SCORE_SEEN}` | the same of every class of all lanes, see below |\n"
_SEEN_README = f"""
`{SCORE_SEEN}` has the same arguments, and takes the row of any lane of a sequence. Column c of its
scores is the class `{IMAGES}.{SEEN}.classes[c]`, a pair of a lane and a class. Columns of lanes of
another sequence (`{IMAGES}.{SEEN}.sequence`, a number for each row) are minus infinity.
"""
