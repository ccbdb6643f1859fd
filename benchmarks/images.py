"""Seconds and peak memory of training steps of CoOp and VPT, compared with torch.

    python -m benchmarks.images [--repeats 7] [--out docs/benchmarks/images.json]

The shape of CLIP ViT-B/32, random weights, float32, CPU; B = 16 images, 32 classes, texts of 24
positions. CoOp trains 16 context words; every step encodes all class texts and, without gradient,
the images. VPT trains 16 tokens in each of the 12 layers of the image encoder; the features of
class texts are computed once. The peer is the same step in torch, on transformers' CLIPModel with
its default attention: cross entropy of scaled cosines, SGD with momentum. It needs the `parity`
extra. Each contestant has a separate process with all cores, and they take turns. Figures are
medians. Memory is the peak resident set of the process in its steps, weights included: what making
the weights took is returned to the system before, and the peak starts anew. Then both sides keep
freed memory (mpt_jax/runtime/malloc.py).

Before the contest, both sides compute the loss of the same weights, prompts and images, which must
agree to 1e-4.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import contest, figures
from mpt_jax.backbones.clip import CLIP, CLIPConfig, clip_config, parameter_shapes
from mpt_jax.core.runs import Runs
from mpt_jax.core.tree import unflatten
from mpt_jax.models.class_texts import ClassTexts, TaskClasses
from mpt_jax.models.dual_encoder import PromptedDualEncoder
from mpt_jax.prompts.init import Normal
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.prompts.sites import SitePrompts
from mpt_jax.runtime import malloc
from mpt_jax.training.optimizers import PromptOptimizer, sgd
from mpt_jax.training.partitioning import PjitPartitioner
from mpt_jax.training.schedules import Schedule
from mpt_jax.training.state import create_train_state
from mpt_jax.training.trainer import Trainer

B, CLASSES, CONTEXT, TOKENS, LENGTH = 16, 32, 16, 16, 24
RATE = 0.002
METHODS = ("coop", "vpt")
CONTESTANTS = tuple(f"{side}_{method}" for method in METHODS for side in ("mpt_jax", "torch"))


def config(name: str = "clip_vit_b32") -> CLIPConfig:
    """Returns the backbone's shape."""
    return clip_config(name, dtype="float32")


def weights(config: CLIPConfig) -> dict[str, Any]:
    """Returns random weights of sensible scales, the same in every process."""
    rng = np.random.default_rng(0)
    leaves = {}
    for name, shape in parameter_shapes(config).items():
        last = name.rpartition("/")[2]
        if last == "scale":
            leaves[name] = np.ones(shape, np.float32)
        elif last == "logit_scale":
            leaves[name] = np.float32(2.66)
        elif last == "bias":
            leaves[name] = np.zeros(shape, np.float32)
        else:
            std = 0.02 if last == "embedding" else shape[0] ** -0.5
            leaves[name] = (std * rng.standard_normal(shape)).astype(np.float32)
    return unflatten(leaves)


def texts(config: CLIPConfig, context: int) -> ClassTexts:
    """Returns class texts of random tokens with `context` positions for a prompt."""
    assert config.text is not None
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, config.text.vocab_size - 2, (CLASSES, LENGTH)).astype(np.int32)
    slots = np.zeros_like(tokens)
    slots[:, 1 : 1 + context] = np.arange(1, context + 1)
    names = tuple(f"class {number}" for number in range(CLASSES))
    end = np.full(CLASSES, context + 4, np.int32)
    task = TaskClasses("task", names)
    number = np.arange(CLASSES, dtype=np.int32)
    return ClassTexts((task,), (0,), context, tokens, slots, end, number)


def batch(config: CLIPConfig) -> dict[str, np.ndarray]:
    """Returns images and labels."""
    rng = np.random.default_rng(2)
    size = config.image.image_size
    return {
        "image": rng.integers(0, 256, (B, size, size, 3), np.uint8),
        "task_ids": np.zeros(B, np.int32),
        "label": rng.integers(0, CLASSES, B).astype(np.int32),
        "loss_weights": np.ones(B, np.float32),
    }


class Ours:
    """The trainer's own compiled step."""

    def __init__(self, method: str, config: CLIPConfig):
        import jax

        width = Normal(0.02)
        rows = config.image.num_layers * TOKENS
        prompt = SitePrompts(
            PromptTuning(CONTEXT, width) if method == "coop" else None,
            PromptTuning(rows, width) if method == "vpt" else None,
            image_layers=config.image.num_layers if method == "vpt" else 1,
        )
        rates = {"task": Schedule(RATE, decay="constant")}
        rule = lambda: sgd(weight_decay=0.0)  # noqa: E731
        optimizer = PromptOptimizer(rates, weight_decay=0.0, clip_norm=None, rule=rule)
        context = CONTEXT if method == "coop" else 0
        model = PromptedDualEncoder(
            CLIP(config), prompt, Runs(["task"]), texts(config, context), optimizer
        )
        backbone = weights(config)
        embedding = jax.numpy.asarray(model.embedding(backbone))
        first = model.init_prompt(jax.random.PRNGKey(0), embedding)
        params = model.precompute({**backbone, "prompt": first})
        partitioner = PjitPartitioner()
        state = create_train_state(model, params, partitioner)
        self.trainer = Trainer(model, state, partitioner, jax.random.PRNGKey(0))

    def step(self, batch: dict[str, np.ndarray]) -> None:
        """Takes one step."""
        import jax

        self.trainer.train(batch)
        jax.block_until_ready(self.trainer.state.trainable)

    def loss(self, batch: dict[str, np.ndarray]) -> float:
        """Returns the loss of the present prompt."""
        return self.trainer.evaluate([batch])["loss"]

    def prompt(self) -> np.ndarray:
        """Returns the present prompt."""
        site = next(iter(self.trainer.state.trainable["prompt"].values()))
        return np.asarray(site["table"][0])


class Torch:
    """The same step in torch, on transformers' CLIPModel."""

    def __init__(self, method: str, config: CLIPConfig, prompt: np.ndarray | None = None):
        import tempfile

        import torch
        from transformers import CLIPModel

        from mpt_jax.convert.clip import save_clip

        self.torch, self.method = torch, method
        with tempfile.TemporaryDirectory() as folder:
            save_clip(f"{folder}/clip", weights(config), config)
            self.model = CLIPModel.from_pretrained(f"{folder}/clip").requires_grad_(False).eval()
        rows = CONTEXT if method == "coop" else config.image.num_layers * TOKENS
        assert config.text is not None
        width = config.text.emb_dim if method == "coop" else config.image.emb_dim
        start = torch.randn(rows, width) * 0.02 if prompt is None else torch.tensor(prompt)
        self.prompt = torch.nn.Parameter(start.float())
        self.optimizer = torch.optim.SGD([self.prompt], lr=RATE, momentum=0.9)
        made = texts(config, CONTEXT if method == "coop" else 0)
        self.tokens = torch.tensor(made.tokens, dtype=torch.long)
        self.slots = torch.tensor(made.slots > 0)
        self.end = torch.tensor(made.eot, dtype=torch.long)
        self.mean = torch.tensor(config.image_mean)[:, None, None]
        self.std = torch.tensor(config.image_std)[:, None, None]
        with torch.no_grad():
            self.fixed: Any = None if method == "coop" else self.text_features()

    def text_features(self) -> Any:
        """Returns normalized features of the class texts."""
        torch, text = self.torch, self.model.text_model
        inputs = text.embeddings.token_embedding(self.tokens)
        if self.method == "coop":
            parts = [inputs[:, :1], self.prompt.expand(CLASSES, -1, -1), inputs[:, 1 + CONTEXT :]]
            inputs = torch.cat(parts, dim=1)
        states = inputs + text.embeddings.position_embedding.weight[:LENGTH]
        causal = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)[None, None]
        for layer in text.encoder.layers:
            states = layer(states, None, causal)[0]
        states = text.final_layer_norm(states)[torch.arange(CLASSES), self.end]
        features = self.model.text_projection(states)
        return features / features.norm(dim=-1, keepdim=True)

    def image_features(self, images: np.ndarray) -> Any:
        """Returns normalized features of images."""
        torch, vision = self.torch, self.model.vision_model
        pixels = torch.tensor(images).permute(0, 3, 1, 2).float() / 255
        states = vision.pre_layrnorm(vision.embeddings((pixels - self.mean) / self.std))
        layers = vision.encoder.layers
        prompts = None
        if self.method == "vpt":
            prompts = self.prompt.reshape(len(layers), TOKENS, -1)
        for number, layer in enumerate(layers):
            if prompts is not None:
                rest = states[:, 1 + (TOKENS if number else 0) :]
                own = prompts[number].expand(len(states), -1, -1)
                states = torch.cat([states[:, :1], own, rest], dim=1)
            states = layer(states, None, None)[0]
        features = self.model.visual_projection(vision.post_layernorm(states[:, 0]))
        return features / features.norm(dim=-1, keepdim=True)

    def _loss(self, batch: dict[str, np.ndarray]) -> Any:
        torch = self.torch
        if self.method == "coop":
            with torch.no_grad():
                images = self.image_features(batch["image"])
            features = self.text_features()
        else:
            images, features = self.image_features(batch["image"]), self.fixed
        logits = self.model.logit_scale.exp() * images @ features.T
        return torch.nn.functional.cross_entropy(logits, torch.tensor(batch["label"]).long())

    def step(self, batch: dict[str, np.ndarray]) -> None:
        """Takes one step."""
        loss = self._loss(batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def loss(self, batch: dict[str, np.ndarray]) -> float:
        """Returns the loss of the present prompt."""
        with self.torch.no_grad():
            return float(self._loss(batch))


def check(config: CLIPConfig, tolerance: float = 1e-4) -> dict[str, float]:
    """Returns the largest difference of the losses of both sides over three steps from the same
    prompt, by method.

    Raises:
        ValueError: they differ by more than `tolerance`.
    """
    differences = {}
    made = batch(config)
    for method in METHODS:
        ours = Ours(method, config)
        peer = Torch(method, config, ours.prompt())
        found = []
        for _ in range(3):
            found.append(abs(ours.loss(made) - peer.loss(made)))
            ours.step(made)
            peer.step(made)
        differences[method] = max(found)
        if max(found) > tolerance:
            raise ValueError(f"The losses of {method} differ by {max(found)}: not the same step.")
    return differences


def work(name: str, config: CLIPConfig) -> contest.Work:
    """Returns a contestant's turn: one step."""
    side, _, method = name.rpartition("_")
    made = batch(config)
    contestant = Ours(method, config) if side == "mpt_jax" else Torch(method, config)
    begin_peak()
    malloc.keep_freed_memory()
    return contest.Work(lambda: contestant.step(made), peak_mib)


def begin_peak() -> None:
    """Returns freed memory to the system, and begins the peak resident set of this process anew, on
    Linux."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """Returns the peak resident set of this process since `begin_peak`, in MiB."""
    status = Path("/proc/self/status").read_text()
    (line,) = (x for x in status.splitlines() if x.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def main() -> None:
    """Prints the ratios, and writes the figures to --out if given."""
    parser = argparse.ArgumentParser(description="Training steps of CoOp and VPT against torch.")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--name", default="clip_vit_b32", help="a published CLIP's shape")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help="only compare the losses")
    args = parser.parse_args()
    shape = config(args.name)
    if args.serve:
        contest.serve(lambda: work(args.serve, shape), warm_ups=2)
        return
    if args.check:
        print(json.dumps(check(shape)))
        return
    # In a separate process, because contestants inherit the peak memory of this one.
    checked = [sys.executable, "-m", "benchmarks.images", "--name", args.name, "--check"]
    differences = json.loads(subprocess.run(checked, capture_output=True, check=True).stdout)
    command = ["benchmarks.images", "--name", args.name, "--serve"]
    found = contest.compare({name: [*command, name] for name in CONTESTANTS}, args.repeats)
    kept = ("peak_mib", "median_seconds", "min_seconds", "max_seconds")
    rows = {name: {field: row[field] for field in kept} for name, row in found.items()}
    ratios = {
        f"{what} of {method}, ours / torch": rows[f"mpt_jax_{method}"][field]
        / rows[f"torch_{method}"][field]
        for method in METHODS
        for what, field in (("time", "median_seconds"), ("peak memory", "peak_mib"))
    }
    record = {"repeats": args.repeats, **figures.machine(), "contestants": rows}
    record |= {"loss_differences": differences, "ratios": ratios}
    figures.report(record, args.out)


if __name__ == "__main__":
    main()
