"""Contrastive pretraining of the tiny CLIP on captioned images of the toy world.

    python -m mpt_jax.tasks.toy_clip_pretrain --out FOLDER [--steps 1200 --seed 0]

writes a Hugging Face folder with a log. Training is in float32; the folder has bfloat16 weights,
and all results in its log are those of the rounded weights.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import json
import math
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpt_jax.backbones.clip import (
    CLIP,
    CLIPConfig,
    ImageTowerConfig,
    TextTowerConfig,
    parameter_shapes,
)
from mpt_jax.convert.backbones import cast
from mpt_jax.convert.clip import write_clip
from mpt_jax.core.shapes import Array, Float, Params
from mpt_jax.data.classes import PLACE
from mpt_jax.runtime.files import new_folder
from mpt_jax.tasks import images, toy_captions, toy_image_tasks
from mpt_jax.tasks import toy_images as world

BATCH = 256
PEAK, WARMUP, DECAY = 1e-3, 200, 0.1
MOST_LOGIT_SCALE = math.log(100.0)
DIFFERENT = 0.15  # of the images have objects of different shapes
LOG_EVERY = 100
MOST_TEXTS = max(len(x.templates) * len(x.class_names) for x in toy_image_tasks.TASKS.values())


def config() -> CLIPConfig:
    """Returns the configuration of the tiny CLIP."""
    sizes = {"emb_dim": 128, "num_heads": 4, "mlp_dim": 512}
    return CLIPConfig(
        image=ImageTowerConfig(num_layers=4, patch_size=8, image_size=world.SIDE, **sizes),
        text=TextTowerConfig(
            num_layers=3,
            vocab_size=toy_captions.tokenizer().vocab_size,
            context_length=toy_captions.CONTEXT,
            **sizes,
        ),
        joint_dim=64,
    )


# --- data ------------------------------------------------------------------------------------


def scenes_of_step(seed: int, step: int) -> list[world.Scenes]:
    """Returns the scenes of a batch: those of equal objects, then those of different ones."""
    rng = world.generator("toy_clip_pretrain scenes", seed, step)
    different = round(DIFFERENT * BATCH)
    return [world.sample(BATCH - different, rng), world.sample_different(different, rng)]


def batch(seed: int, step: int) -> dict[str, np.ndarray]:
    """Returns images uint8 [B,S,S,3], tokens [B,T] and the positions of their ends [B]."""
    rng = world.generator("toy_clip_pretrain images", seed, step)
    writer = random.Random(f"toy_clip_pretrain captions {seed} {step}")
    parts = scenes_of_step(seed, step)
    drawn = np.concatenate([world.draw(scenes, rng) for scenes in parts])
    texts = [text for scenes in parts for text in toy_captions.captions(scenes, writer)]
    tokens, ends = toy_captions.tokens(texts)
    return {"images": drawn, "tokens": tokens, "ends": ends}


def batches(seed: int, steps: int, ahead: int = 4) -> Iterator[dict[str, np.ndarray]]:
    """Yields the batches of a run, which a thread draws ahead of time."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        futures = [pool.submit(batch, seed, step) for step in range(min(ahead, steps))]
        for step in range(steps):
            if step + ahead < steps:
                futures.append(pool.submit(batch, seed, step + ahead))
            yield futures.pop(0).result()


# --- training --------------------------------------------------------------------------------


def image_features(params: Params, pixels: Any) -> Float[Array, "B U"]:
    """Returns the normalized features of images."""
    return _unit(CLIP(config()).apply({"params": params}, pixels, method="encode_image"))


def text_features(params: Params, tokens: Any, ends: Any) -> Float[Array, "C U"]:
    """Returns the normalized features of texts."""
    clip, variables = CLIP(config()), {"params": params}
    embedded = clip.apply(variables, tokens, method="embed_tokens")
    return _unit(clip.apply(variables, embedded, ends, method="encode_text"))


def _unit(x: Any) -> Float[Array, "B U"]:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def contrastive_loss(
    params: Params, batch: dict[str, Any]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the cross entropy of pairs within a batch, averaged over both directions, and the
    fraction of images whose caption scores highest."""
    image = image_features(params, batch["images"])
    text = text_features(params, batch["tokens"], batch["ends"])
    logits = jnp.exp(params["logit_scale"]) * image @ text.T
    pairs = jnp.arange(len(logits))
    losses = [optax.softmax_cross_entropy_with_integer_labels(x, pairs) for x in (logits, logits.T)]
    return jnp.mean(jnp.stack(losses)), jnp.mean(jnp.argmax(logits, 1) == pairs)


def optimizer(steps: int) -> optax.GradientTransformation:
    """Returns AdamW, which decays only matrices, with a warm-up and a cosine schedule."""
    warmup = min(WARMUP, steps // 2)
    rate = optax.warmup_cosine_decay_schedule(0.0, PEAK, warmup, steps)
    return optax.adamw(
        rate, weight_decay=DECAY, mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
    )


@functools.partial(jax.jit, static_argnames="steps", donate_argnums=(0, 1))
def train_step(
    params: Params, state: Any, batch: dict[str, Any], steps: int
) -> tuple[Params, Any, Float[Array, "2"]]:
    """Returns the updated parameters and state, and the loss and accuracy before the update."""
    (loss, accuracy), grads = jax.value_and_grad(contrastive_loss, has_aux=True)(params, batch)
    updates, state = optimizer(steps).update(grads, state, params)
    updated: Any = optax.apply_updates(params, updates)
    scale = jnp.minimum(updated["logit_scale"], MOST_LOGIT_SCALE)
    return {**updated, "logit_scale": scale}, state, jnp.stack([loss, accuracy])


def train(steps: int, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Trains from random values; see `backbones/clip/layers.py` for these.

    Returns:
        The parameters, and the lines of the log: means over `LOG_EVERY` steps.
    """
    example = [jnp.asarray(x[:1]) for x in batch(seed, 0).values()]
    params = CLIP(config()).init(jax.random.key(seed), *example)["params"]
    state, start = optimizer(steps).init(params), time.monotonic()
    lines, recent = [], []
    for step, current in enumerate(batches(seed, steps), start=1):
        params, state, measured = train_step(params, state, current, steps)
        recent.append(measured)
        if step % LOG_EVERY == 0 or step == steps:
            loss, accuracy = np.mean([np.asarray(x) for x in recent], 0).tolist()
            line = {
                "step": step,
                "loss": round(loss, 4),
                "batch_accuracy": round(100 * accuracy, 1),
                "logit_scale": round(float(jnp.exp(params["logit_scale"])), 2),
                "seconds": round(time.monotonic() - start, 1),
            }
            lines.append(line)
            recent.clear()
            print(json.dumps(line), flush=True)
    return jax.tree.map(np.asarray, dict(params)), lines


# --- evaluation and files --------------------------------------------------------------------


_image_features, _text_features = jax.jit(image_features), jax.jit(text_features)


def zero_shot(params: Params, task: toy_image_tasks.ToyImageTask) -> float:
    """Returns the metric of a task's test split in percent, for the average text of each class."""
    texts = [t.replace(PLACE, name) for t in task.templates for name in task.class_names]
    drawn, labels = task.arrays("test")
    # All tasks have the same number of texts, so that the text tower is compiled once.
    filled = texts + texts[:1] * (MOST_TEXTS - len(texts))
    text = _text_features(params, *toy_captions.tokens(filled))[: len(texts)]
    means = np.asarray(text).reshape(len(task.templates), len(task.class_names), -1).mean(0)
    means /= np.linalg.norm(means, axis=-1, keepdims=True)
    classes = images.ClassVocabulary(task.class_names, task.templates, task.multi_label)
    scores = np.asarray(_image_features(params, drawn)) @ means.T
    return float(images.metric(task.metric, classes)(labels, scores)[task.metric])


def save(
    folder: str | os.PathLike[str], params: Params, lines: Sequence[dict[str, Any]], seed: int
) -> None:
    """Writes the model with bfloat16 weights, its tokenizer, and the log of its training.

    Raises:
        FileExistsError: the folder already exists.
    """
    rounded = cast(params, "bfloat16")
    results = {name: zero_shot(rounded, task) for name, task in toy_image_tasks.TASKS.items()}
    with new_folder(folder) as scratch:
        write_clip(scratch, rounded, config())
        for name, content in toy_captions.tokenizer_files().items():
            (scratch / name).write_bytes(content)
        (scratch / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        (scratch / "log.md").write_text(summary(lines, seed, results))


def summary(lines: Sequence[dict[str, Any]], seed: int, results: Mapping[str, float]) -> str:
    """Returns the text of log.md."""
    last = lines[-1]
    count = sum(map(math.prod, parameter_shapes(config()).values()))
    rows = [
        f"| {name} | {len(task.class_names)} | {task.metric} | {results[name]:.1f} |"
        for name, task in toy_image_tasks.TASKS.items()
    ]
    rows.append(f"| mean | | | {np.mean(list(results.values())):.1f} |")
    return f"""# How the tiny CLIP was made

    python -m mpt_jax.tasks.toy_clip_pretrain --out FOLDER --steps {last["step"]} --seed {seed}

{count:,} parameters, trained in float32 and stored in bfloat16. {last["step"]:,} steps of {BATCH}
pairs in {last["seconds"]:,.0f} seconds. Over the last steps, the loss was {last["loss"]:.3f}, and
{last["batch_accuracy"]:.1f}% of images preferred their caption to the others of the batch.
`log.jsonl` has the whole course.

Zero-shot results of the stored weights on the test splits, in percent:

| task | classes | metric | zero-shot |
|---|---|---|---|
{chr(10).join(rows)}
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains and writes the tiny CLIP, as the command line says."""
    parser = argparse.ArgumentParser(description="Pretrains the tiny CLIP of the toy image world.")
    parser.add_argument("--out", required=True, help="folder to create")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    if given.steps < 1:
        parser.error(f"--steps is {given.steps}, but at least 1 is needed. Pass --steps 1200.")
    if os.path.exists(given.out):
        parser.error(f"--out {given.out} already exists. Pass another folder, or remove it.")
    save(given.out, *train(given.steps, given.seed), given.seed)
    print(f"Wrote {given.out}")


if __name__ == "__main__":
    main()
