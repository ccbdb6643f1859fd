"""Features of a CLIP or ViT on a fixed batch, by our network and by transformers'."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpt_jax.backbones.clip import CLIP, CLIPConfig
from mpt_jax.backbones.clip.config import CHANNELS

ROWS = 3
SEED = 0


def fixed_batch(config: CLIPConfig) -> dict[str, np.ndarray]:
    """Returns a batch that depends only on the sizes of the model.

    The batch has `images` float32 [3,S,S,3], normalized. With a text tower, it also has `tokens`
    int32 [3,T] and `eot` int32 [3], of the first, a middle and the last position.
    """
    rng = np.random.default_rng(SEED)
    size = config.image.image_size
    batch: dict[str, np.ndarray] = {
        "images": rng.standard_normal((ROWS, size, size, CHANNELS), np.float32)
    }
    if (text := config.text) is not None:
        length = text.context_length
        batch["tokens"] = rng.integers(0, text.vocab_size, (ROWS, length), np.int32)
        batch["eot"] = np.asarray([0, length // 2, length - 1], np.int32)
    return batch


def forward(
    config: CLIPConfig, params: Mapping[str, Any], batch: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Runs our network on a batch, in float32 regardless of the parameters' dtype.

    Args:
        config: the configuration.
        params: the unscanned tree.
        batch: in the form of `fixed_batch`, which is the default; images may be bytes.

    Returns:
        `image` [B,U] or, without a projection, [B,H]; with a text tower also `text` [B,U].
    """
    model = CLIP(config)

    @jax.jit
    def run(params: Any, images: Any, tokens: Any = None, eot: Any = None) -> Any:
        # Cast inside jit, so that a half-precision model is not held twice.
        variables = {"params": jax.tree.map(lambda x: x.astype(jnp.float32), params)}
        return model.apply(variables, images, tokens, eot)

    with jax.default_matmul_precision("highest"):
        image, text = run(params, **(fixed_batch(config) if batch is None else batch))
    outputs = {"image": image, "text": text}
    return {name: np.asarray(x) for name, x in outputs.items() if x is not None}


def hugging_face(torch: Any, model: Any, config: CLIPConfig) -> dict[str, np.ndarray]:
    """Returns the features that transformers' model computes, in the form of `forward`.

    Args:
        torch: the module.
        model: a `CLIPModel` or, if the configuration has no text tower, a `ViTModel`.
        config: our configuration of the model.
    """
    dtype = next(model.parameters()).dtype
    batch = {name: torch.tensor(x) for name, x in fixed_batch(config).items()}
    pixels = batch["images"].permute(0, 3, 1, 2).to(dtype)
    with torch.no_grad(), _default_dtype(torch, dtype):
        if config.text is None:
            return {"image": model(pixels).last_hidden_state[:, 0].numpy()}
        # Its own features are at the end of a text that it searches for among the tokens.
        states = model.text_model(input_ids=batch["tokens"].long()).last_hidden_state
        last = states[torch.arange(ROWS), batch["eot"].long()]
        return {
            "image": model.get_image_features(pixels).numpy(),
            "text": model.text_projection(last).numpy(),
        }


@contextlib.contextmanager
def _default_dtype(torch: Any, dtype: Any) -> Iterator[None]:
    """Sets torch's default dtype, in which transformers makes the causal mask.

    It fills the mask with the smallest value of the model's dtype, which overflows float32 if that
    is float64.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
