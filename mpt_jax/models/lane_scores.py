"""Features of images in the lanes of tasks, and the logits of all tasks so far."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mpt_jax.backbones.clip import lanes as lane_pass
from mpt_jax.backbones.clip.network import CLIP
from mpt_jax.core.runs import Runs
from mpt_jax.core.shapes import Array, Batch, Float, Key, Params
from mpt_jax.models.class_bank import ClassBank
from mpt_jax.models.class_scores import normalized, tower_variables
from mpt_jax.prompts.base import FLOAT32, PromptContext
from mpt_jax.prompts.row_ops import gather_rows


class LaneScores:
    """Mixin that gives `PromptedClassifier` the forward pass of lanes."""

    module: CLIP
    prompt: Any
    runs: Runs
    normalize: bool
    temperature: float
    bank: ClassBank

    def check_lanes(self) -> None:
        """Raises ValueError if the lanes do not fit the backbone."""
        prompt = self.prompt
        if prompt.lane.has_variable_lengths(self.runs):
            raise ValueError(
                "The lanes of runs have different lengths, but all need the same. Set "
                "PRIVATE_LENGTH to one number."
            )
        patches = self.module.config.image.num_tokens - 1
        if prompt.merged_tokens > patches:
            raise ValueError(
                f"MultiLane.merged_tokens is {prompt.merged_tokens}, but an image has {patches} "
                "patches. Lower MERGED_TOKENS."
            )
        if prompt.layers > self.module.config.image.num_layers:
            raise ValueError(
                f"MultiLane.layers is {prompt.layers}, but the image tower has "
                f"{self.module.config.image.num_layers} layers. Lower LANE_LAYERS."
            )

    def lane_features(
        self, params: Params, batch: Batch, key: Key | None = None, every: bool = False
    ) -> Float[Array, "B J U"]:
        """Returns the features of images in the lane of each example's task (J = 1) or, if `every`,
        in the lanes of all K bank rows; of length 1 if `normalize`."""
        config, tower = self.module.config, params["image_encoder"]
        lanes = self.lanes_of_layers(params, key)
        if not every:
            own = lambda x: gather_rows(x, batch["task_ids"])[:, None]  # noqa: E731
            lanes = jax.tree.map(own, lanes)

        def of_image(hidden: tuple[Array, ...], lanes: Any) -> Array:
            return lane_pass.lane_features(
                tower,
                config,
                hidden,
                lanes,
                self.prompt.drop_and_replace,
                self.prompt.merged_tokens,
            )

        hidden = self.layer_inputs(params, batch)
        features = jax.vmap(of_image, (0, None if every else 0))(hidden, lanes)
        return normalized(features) if self.normalize else features

    def layer_inputs(self, params: Params, batch: Batch) -> tuple[Float[Array, "B I H"], ...]:
        """Returns the tokens of images that enter each layer of the frozen image encoder."""
        variables = tower_variables(params, "image_encoder")
        encode: Any = self.module.apply
        _, hidden = encode(variables, batch["image"], None, True, method="encode_image")
        return hidden[:-1]

    def lanes_of_layers(self, params: Params, key: Key | None) -> list[lane_pass.LayerLanes]:
        """Returns what the lanes of all bank rows bring to each layer."""
        prompt, config = self.prompt, self.module.config
        rows = jnp.arange(self.runs.num_rows)
        lanes = prompt.lanes(params["prompt"], self.runs, rows, PromptContext(key=key))
        stack = lane_pass.layers_of(params["image_encoder"], config)
        found: list[Any] = [None] * len(stack)
        if prompt.selectors:
            reading = stack if prompt.drop_and_replace else stack[:1]
            selectors = lane_pass.selectors_of_layers(reading, config, lanes.selectors)
            found[: len(reading)] = selectors
        return [
            lane_pass.LayerLanes(
                selectors,
                lanes.keys[:, i] if i < prompt.layers else None,
                lanes.values[:, i] if i < prompt.layers else None,
            )
            for i, selectors in enumerate(found)
        ]

    def seen_logits(self, params: Params, batch: Batch) -> Float[Array, "B N"]:
        """Returns the logits of all classes of the runs in each example's group, each from the lane
        of its run; minus infinity at those of other groups. Classes are in the order of the runs,
        and those of a run in the order of their ids."""
        features = self.lane_features(params, batch, every=True)
        row = jnp.asarray(self.bank.row)
        number = jnp.arange(len(self.bank.row)) - jnp.asarray(self.bank.first)[row]
        kernel, bias = self.prompt.head(params["prompt"], jnp.arange(self.runs.num_rows))
        product = jnp.einsum("bku,kcu->bkc", features, kernel, precision=FLOAT32)
        logits = ((product + bias[None]) / self.temperature)[:, row, number]
        return jnp.where(self.bank.competes(batch["task_ids"]), logits, -jnp.inf)

    def score_seen_batch(self, params: Params, batch: Batch) -> Float[Array, "B N"]:
        """Returns the log probability of each of the `seen_logits`, in nats. Classes of all lanes
        of a sequence compete; those of multi-label tasks have separate probabilities."""
        logits = self.seen_logits(params, batch)
        multi = jnp.asarray(self.bank.is_multi_label)[batch["task_ids"]][:, None]
        return jnp.where(multi, jax.nn.log_sigmoid(logits), jax.nn.log_softmax(logits))
