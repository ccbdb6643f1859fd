"""Export of the scores of images, lowered by `jax.export` for several platforms at once.

The features of all classes are computed here and are arguments of the function, so the text encoder
is not part of the export.
"""

from __future__ import annotations

import hashlib
import json
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
from mpt_jax.prompts.sites import IMAGE
from mpt_jax.runtime.files import new_folder
from mpt_jax.serving.export.loading import BACKBONE, CONFIG, FORMAT, IMAGES, PROMPTS, SCORE, SEAL
from mpt_jax.serving.export.writing import README, WITHOUT_WEIGHTS, Settings, check_new, flat
from mpt_jax.serving.predict.image_server import ImageServer

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
    lowered = _lowered(server, arguments, settings)
    weights = save(arguments["backbone"])
    files = {PROMPTS: save(arguments["prompts"]), SCORE: bytes(lowered.serialize())}
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


def _lowered(server: ImageServer, arguments: dict[str, Any], settings: Settings) -> export.Exported:
    """Returns the score function, lowered for any number of images."""
    size = server.inputs.transform["size"]

    def score(backbone, prompts, images, rows):
        sites = {name: x for name, x in prompts.items() if name != CLASSES}
        params = {**unflatten(backbone), "prompt": unflatten(sites)}
        if CLASSES in prompts:
            params[FEATURES] = {"table": prompts[CLASSES]}
        return server.model.score_batch(params, {"image": images, "task_ids": rows})

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
    return f"""# A CLIP with prompts of {tasks} tasks, exported by MPT-JAX

StableHLO of one function for {", ".join(config["platforms"])}, as `jax.export` writes it. It needs
only JAX and safetensors, not MPT-JAX.

| file | what |
|---|---|
| `{SCORE}` | the log probability of every class of an image's task, in nats |
| `{BACKBONE}` | the weights of the image encoder |
| `{PROMPTS}` | the features of all classes (`{CLASSES}`), and the image tokens, if any |
| `{CONFIG}` | names of tasks and classes, the image transform; sha256 of all files |
{"" if weights else WITHOUT_WEIGHTS}
A call takes any number of images, uint8 [b, {size}, {size}, 3], each with the row of its task.
Row k is the task `names[k]`, and column c of its scores is the class
`{IMAGES}.classes[names[k]][c]`; other columns are minus infinity. Images are resized as
`{IMAGES}.transform` says ({transform["mode"]}, bicubic with antialiasing, as Pillow does). The
function does not check rows; `mpt_jax.serving.export.load` does.

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
