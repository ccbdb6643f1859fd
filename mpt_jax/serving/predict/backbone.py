"""The backbone and vocabulary of a prompt bank, loaded and compared by digest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from mpt_jax.artifacts import artifacts
from mpt_jax.backbones.t5 import T5Config
from mpt_jax.batching import tokenizers
from mpt_jax.batching.tokenizers import Tokenizer
from mpt_jax.convert import backbones
from mpt_jax.core.shapes import Params
from mpt_jax.runtime import paths
from mpt_jax.serving.prompt_bank import Bank

# The backbone and vocabulary of the toy suite (gin/tiny.gin).
SHIPPED = ("tiny_t5/checkpoint_10000", "toy.model", 16)


class Backbone(NamedTuple):
    """A backbone and its vocabulary.

    Attributes:
        config: the backbone's configuration.
        params: its parameters, in the dtype it computes in, on the device.
        vocabulary: the vocabulary of inputs and targets.
        embedding_sha256, vocabulary_sha256: digests that artifacts are compared with.
    """

    config: T5Config
    params: Params
    vocabulary: Tokenizer
    embedding_sha256: str
    vocabulary_sha256: str | None


def load(  # noqa: PLR0913 - each is an option of the command
    bank: Bank,
    path: str | None = None,
    vocabulary: str | None = None,
    *,
    extra_ids: int | None = None,
    config: str | None = None,
    dtype: str = "float32",
    say: Callable[[str], None] = logging.info,
) -> Backbone:
    """Loads the backbone of a bank. Fails with any other backbone or vocabulary.

    Args:
        bank: the prompts, whose artifacts record the digests of both.
        path: a Hugging Face folder or a T5X checkpoint; None loads the shipped tiny T5.
        vocabulary: a SentencePiece model, a folder with one, or 'byt5'; None loads the one in the
            backbone's folder, or the shipped one for the shipped T5.
        extra_ids: number of sentinels of the vocabulary (see `tokenizers.load`).
        config: a name such as t5_1_1_base, or a config.json, if shapes are not enough.
        dtype: the dtype that the backbone computes in, `'float32'` or `'bfloat16'`.
        say: called with a line on the settings that had to be assumed.

    Raises:
        FileNotFoundError: there is no backbone or no vocabulary.
        ValueError: the prompts were trained with another one; shows both digests.
    """
    shipped = path is None
    path = paths.shipped(name=SHIPPED[0]) if path is None else path
    # There is nothing to report about the shipped T5.
    shape, params = backbones.read(epath.Path(path), config, (lambda _: None) if shipped else say)
    embedding = params["token_embedder"]["embedding"]
    digest = artifacts.embedding_digest(embedding)
    if shipped and digest != bank.config["embedding_sha256"]:
        raise ValueError(
            f"These prompts were trained with the backbone {bank.config['backbone']!r} (sha256 of "
            f"its embedding {bank.config['embedding_sha256']}), not with the shipped tiny T5. Set "
            "--backbone to its Hugging Face folder or T5X checkpoint."
        )
    bank.check_belongs(digest, None)
    tokenizer = _vocabulary(vocabulary, path, shipped, extra_ids)
    vocabulary_sha256 = artifacts.vocabulary_digest(tokenizer)
    bank.check_belongs(digest, vocabulary_sha256)
    if tokenizer.vocab_size > len(embedding):
        raise ValueError(
            f"The vocabulary has {tokenizer.vocab_size} ids, but the backbone embeds only "
            f"{len(embedding)}. Give the vocabulary that the backbone was trained with "
            "(--vocabulary)."
        )
    shape = dataclasses.replace(shape, dtype=dtype)
    cast = jax.tree.map(lambda x: np.asarray(x).astype(jnp.dtype(dtype), copy=False), params)
    return Backbone(shape, jax.device_put(cast), tokenizer, digest, vocabulary_sha256)


def _vocabulary(
    vocabulary: str | None, backbone: str, shipped: bool, extra_ids: int | None
) -> Tokenizer:
    if vocabulary is not None:
        return tokenizers.load(vocabulary, extra_ids)
    if shipped:
        return tokenizers.load(paths.shipped(name=SHIPPED[1]), SHIPPED[2])
    try:
        return tokenizers.load(backbone, extra_ids)
    except (FileNotFoundError, ValueError) as error:
        raise FileNotFoundError(
            f"The backbone {backbone} has no vocabulary beside it ({error}). Set --vocabulary to a "
            "SentencePiece model, a folder with one, or byt5."
        ) from error
