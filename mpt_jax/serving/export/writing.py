"""Export of predict and score, lowered by `jax.export` for several platforms at once.

Weights and prompts are arguments, not constants, so the functions are small and prompts of the same
shapes can be exchanged. The batch size is symbolic. The number of tokens is not, since T5's
relative position biases are built for one length when the function is traced. Attention uses plain
operations on every platform, since the TPU kernels depend on the chip, which is unknown at export.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from safetensors.numpy import save

import mpt_jax
from mpt_jax.artifacts.backbone_digest import backbone_config
from mpt_jax.core import schema
from mpt_jax.core.tree import flatten, unflatten
from mpt_jax.runtime.files import new_folder
from mpt_jax.serving.export.loading import BACKBONE, CONFIG, FORMAT, PROMPTS, SEAL
from mpt_jax.serving.predict.backbone import Backbone
from mpt_jax.serving.predict.compiled import Functions
from mpt_jax.serving.prompt_bank import Bank

PLATFORMS = ("cpu", "tpu", "cuda", "rocm")
VOCABULARY = "vocabulary.model"
README = "README.md"
WITHOUT_WEIGHTS = """
This folder was written without the backbone's weights: take `backbone.safetensors` from another
export of the same backbone.
"""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of an export.

    Attributes:
        platforms: the platforms that the functions run on.
        input_lengths: the input lengths in tokens. Each gets a predict and a score function.
        target_length: the number of tokens to decode or score.
        weights: whether to write the backbone's weights.
    """

    platforms: Sequence[str] = ("cpu", "tpu", "cuda")
    input_lengths: Sequence[int] = (128, 512)
    target_length: int = 64
    weights: bool = True

    def __post_init__(self):
        if unknown := [name for name in self.platforms if name not in PLATFORMS]:
            raise ValueError(
                f"Unknown platforms: {', '.join(map(repr, unknown))}. Set --platforms to names "
                f"from {', '.join(PLATFORMS)}, separated by commas."
            )
        lengths = [*self.input_lengths, self.target_length]
        if not self.platforms or not self.input_lengths or min(lengths) < 1:
            raise ValueError(
                "An export needs at least one platform and positive lengths, but got "
                f"platforms={list(self.platforms)}, input_lengths={list(self.input_lengths)} and "
                f"target_length={self.target_length}. Correct --platforms, --input-lengths or "
                "--target-length."
            )


def write(folder: Path, bank: Bank, backbone: Backbone, settings: Settings) -> dict[str, Any]:
    """Writes an exported folder.

    Args:
        folder: the folder to create. If writing fails, it is not created.
        bank: the prompt bank, with the method's factors or with plain prompts.
        backbone: the backbone of the prompts.
        settings: the settings of the export.

    Returns:
        The contents of the folder's config.json.

    Raises:
        FileExistsError: the folder already exists.
    """
    check_new(folder)
    config = dataclasses.replace(backbone.config, fused_attention=False, fused_mlp=False)
    length, vocabulary = settings.target_length, backbone.vocabulary
    model = Functions(config, bank.method, length, vocabulary, bank.lengths_differ)
    arguments = {"backbone": flat(backbone.params), "prompts": flat(bank.arrays)}
    files: dict[str, bytes] = {PROMPTS: save(arguments["prompts"])}
    weights = save(arguments["backbone"])
    functions: dict[str, dict[str, str]] = {"predict": {}, "score": {}}
    for length in sorted(set(settings.input_lengths)):
        for name, lowered in _lowered(model, arguments, length, settings).items():
            functions[name][str(length)] = f"{name}_{length}.jax"
            files[functions[name][str(length)]] = bytes(lowered.serialize())
    if model := getattr(backbone.vocabulary, "sp_model", None):
        files[VOCABULARY] = model
    files |= getattr(backbone.vocabulary, "files", {})  # of a Hugging Face tokenizer
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    record = {
        "format": FORMAT,
        "names": list(bank.names),
        "functions": functions,
        "platforms": list(settings.platforms),
        "target_length": settings.target_length,
        "eos_id": backbone.vocabulary.eos_id,
        "dtype": str(config.dtype),
        "method": bank.method.name,
        "method_config": bank.method.config(),
        "folded": bank.folded,
        "backbone": bank.config["backbone"],
        "embedding_sha256": backbone.embedding_sha256,
        "backbone_sha256": backbone.backbone_sha256,
        "backbone_config": backbone_config(config),
        "vocabulary_sha256": backbone.vocabulary_sha256,
        "files_sha256": digests | {BACKBONE: hashlib.sha256(weights).hexdigest()},
        "versions": {"mpt_jax": mpt_jax.__version__, "jax": jax.__version__},
    }
    record = schema.sealed(record, SEAL)
    with new_folder(folder) as scratch:
        for name, data in (files | ({BACKBONE: weights} if settings.weights else {})).items():
            (scratch / name).write_bytes(data)
        (scratch / CONFIG).write_text(json.dumps(record, indent=2) + "\n")
        (scratch / README).write_text(readme(record, settings.weights))
    return record


def check_new(folder: Path) -> None:
    """Raises FileExistsError if the folder exists. Call it before any slow work."""
    if folder.exists():
        raise FileExistsError(
            f"{folder} already exists. Set --out to another folder, or remove the existing one."
        )


def flat(tree: Any) -> dict[str, np.ndarray]:
    """Returns the leaves of a tree as NumPy arrays, by path name."""
    return {n: np.asarray(jax.device_get(x), order="C") for n, x in flatten(tree).items()}


def _lowered(
    model: Functions, arguments: dict[str, Any], length: int, settings: Settings
) -> dict[str, export.Exported]:
    """Returns predict and score, lowered for texts of one length and any batch size."""

    def predict(backbone, prompts, tokens, rows):
        return model.predict(unflatten(backbone), unflatten(prompts), tokens, rows)

    def score(backbone, prompts, tokens, targets, rows):
        return model.score(unflatten(backbone), unflatten(prompts), tokens, targets, rows)

    (batch,) = export.symbolic_shape("b", constraints=["b >= 1"])
    ids = lambda *shape: jax.ShapeDtypeStruct((batch, *shape), jnp.int32)  # noqa: E731
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    weights = (shapes["backbone"], shapes["prompts"])
    lower = lambda f: export.export(jax.jit(f), platforms=tuple(settings.platforms))  # noqa: E731
    return {
        "predict": lower(predict)(*weights, ids(length), ids()),
        "score": lower(score)(*weights, ids(length), ids(settings.target_length), ids()),
    }


def readme(config: dict[str, Any], weights: bool) -> str:
    """Returns the README of an exported folder, which explains how to call the functions."""
    tasks, eos, targets = len(config["names"]), config["eos_id"], config["target_length"]
    lengths = [int(length) for length in config["functions"]["predict"]]
    form = "plain prompts" if config["folded"] else f"factors of the method `{config['method']}`"
    return f"""# A T5 with prompts of {tasks} tasks, exported by MPT-JAX

StableHLO of two functions for {", ".join(config["platforms"])}, as `jax.export` writes it. They
need only JAX, flatbuffers and safetensors, not MPT-JAX. Attention uses plain operations on every
platform.

| file | what |
|---|---|
| `predict_N.jax` | greedy decoding of texts of N tokens, N one of {lengths} |
| `score_N.jax` | the log probability of targets of {targets} tokens, in nats |
| `{BACKBONE}` | the weights of the backbone `{config["backbone"]}`, {config["dtype"]} |
| `{PROMPTS}` | {form}; a row for each of `names` in `{CONFIG}` |
| {_vocabulary_files(config)} |
| `{CONFIG}` | names of tasks; sha256 of all files, of embedding and vocabulary |
{"" if weights else WITHOUT_WEIGHTS}
A call takes any number of texts, each with the row of its task. Texts and targets end with id {eos}
and are padded with 0. Prompts are arguments, so other prompts of the same shapes may be passed. Row
k is the task `names[k]`, from 0 to {tasks - 1}. The functions do not check rows: with any other row
they silently use a prompt of zeros or of another task. `mpt_jax.serving.export.load` rejects it.

```python
import json

import jax
import numpy as np
from jax import export
from safetensors.flax import load_file

config = json.load(open("{CONFIG}"))
backbone, prompts = load_file("{BACKBONE}"), load_file("{PROMPTS}")
function = export.deserialize(bytearray(open("predict_{lengths[0]}.jax", "rb").read()))
predict = jax.jit(function.call)

tokens = np.zeros((2, {lengths[0]}), np.int32)
tokens[0, :3], tokens[1, :2] = [5, 6, {eos}], [7, {eos}]
rows = np.array([0, {tasks - 1}], np.int32)
ids, scores = predict(backbone, prompts, tokens, rows)
```

`score(backbone, prompts, tokens, targets, rows)` also takes targets, int32 [rows, {targets}]. With
MPT-JAX installed, `mpt_jax.serving.export.load(FOLDER)` does the padding and checks every sha256.
"""


def _vocabulary_files(config: dict[str, Any]) -> str:
    """Returns the README's row of the vocabulary."""
    known = {PROMPTS, BACKBONE, VOCABULARY}
    others = [n for n in config["files_sha256"] if n not in known and not n.endswith(".jax")]
    if others:
        return f"`{'`, `'.join(others)}` | the Hugging Face tokenizer"
    return (
        f"`{VOCABULARY}` | the SentencePiece model with its sentinels; absent for byte vocabularies"
    )
