"""The backbone and vocabulary of a prompt bank, loaded and checked against its digests."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from mpt_jax.artifacts import artifacts
from mpt_jax.artifacts.backbone_digest import backbone_config, backbone_digest
from mpt_jax.backbones.t5 import T5Config
from mpt_jax.backbones.t5.scanned_params import layer_kernels
from mpt_jax.batching import tokenizers
from mpt_jax.batching.tokenizers import Tokenizer
from mpt_jax.convert import backbones
from mpt_jax.core import schema
from mpt_jax.core.runs import Runs
from mpt_jax.core.shapes import Params
from mpt_jax.core.tree import flatten, match_exactly
from mpt_jax.prompts.base import InitContext
from mpt_jax.runtime import paths
from mpt_jax.serving.prompt_bank import PROMPT, Bank, compose

# The backbone and vocabulary of the toy suite (gin/tiny.gin).
SHIPPED = ("tiny_t5/checkpoint_10000", "toy.model", 16)


class Backbone(NamedTuple):
    """A backbone and its vocabulary.

    Attributes:
        config: the backbone's configuration.
        params: the backbone's parameters on the device, in the dtype of computation.
        vocabulary: the vocabulary of inputs and targets.
        embedding_sha256, vocabulary_sha256, backbone_sha256: the digests to compare with those of
            artifacts. `backbone_sha256`, of all weights, is None if it was switched off.
    """

    config: T5Config
    params: Params
    vocabulary: Tokenizer
    embedding_sha256: str
    vocabulary_sha256: str | None
    backbone_sha256: str | None


def load(  # noqa: PLR0913 - each is an option of the command
    bank: Bank,
    path: str | None = None,
    vocabulary: str | None = None,
    *,
    extra_ids: int | None = None,
    config: str | None = None,
    dtype: str = "float32",
    digest_backbone: bool = True,
    say: Callable[[str], None] = logging.info,
    warn: Callable[[str], None] = logging.warning,
) -> Backbone:
    """Loads the backbone and vocabulary of a bank.

    Args:
        bank: the prompt bank, which records the digests of its backbone and vocabulary.
        path: a Hugging Face folder or a T5X checkpoint; None loads the shipped tiny T5.
        vocabulary: the vocabulary (see `vocabularies.load`); None loads the one in the backbone's
            folder, or the shipped one for the shipped T5.
        extra_ids: the number of sentinels of the vocabulary (see `tokenizers.load`).
        config: a name such as t5_1_1_base, or a config.json; None to read it from the checkpoint
            or, if the checkpoint has none, to infer it from the shapes.
        dtype: the dtype that the backbone computes in, `'float32'` or `'bfloat16'`.
        digest_backbone: whether to compare all weights with those that the prompts were trained
            with, by digest. Otherwise, only the embedding is compared.
        say: called with a line that lists the assumed settings, if the configuration is inferred.
        warn: called with a line if the backbone could not be compared by all its weights.

    Raises:
        FileNotFoundError: the backbone or the vocabulary does not exist.
        ValueError: the backbone or the vocabulary cannot be read; the prompts were trained with
            another backbone, configuration or vocabulary, and the message shows both values; they
            have another width; or the vocabulary has more ids than the backbone embeds.
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
            "--backbone to the Hugging Face folder or T5X checkpoint of that backbone."
        )
    weights = backbone_digest(params) if digest_backbone else None
    bank.check_backbone(digest, weights, backbone_config(shape), warn)
    if weights is None:
        warn(
            "Only the backbone's embedding was checked against the prompts, since the digest of "
            "all weights is switched off (--no-backbone-digest)."
        )
    if bank.method.adapts:
        _check_adapter(bank, params)
    else:
        _check_width(bank, embedding.shape[1])
    tokenizer = _vocabulary(vocabulary, path, shipped, extra_ids)
    vocabulary_sha256 = artifacts.vocabulary_digest(tokenizer)
    bank.check_vocabulary(vocabulary_sha256)
    if tokenizer.vocab_size > len(embedding):
        raise ValueError(
            f"The vocabulary has {tokenizer.vocab_size} ids, but the backbone embeds only "
            f"{len(embedding)}. Set --vocabulary to the vocabulary that the backbone was trained "
            "with, or lower --extra-ids."
        )
    shape = dataclasses.replace(shape, dtype=dtype)
    cast = jax.tree.map(lambda x: np.asarray(x).astype(jnp.dtype(dtype), copy=False), params)
    return Backbone(shape, jax.device_put(cast), tokenizer, digest, vocabulary_sha256, weights)


def _check_width(bank: Bank, width: int) -> None:
    """Raises ValueError if the bank does not compose prompts of the backbone's width."""
    rows = jnp.zeros(1, jnp.int32)
    pooled = jnp.zeros((1, width), jnp.float32) if bank.method.reads_text else None
    what = f"The prompts do not fit the backbone, whose width is {width}"
    with schema.damage(what, artifacts.COPY_AGAIN):
        shape = jax.eval_shape(functools.partial(compose, bank.method), bank.arrays, rows, pooled)
        if shape.shape[-1] != width:
            raise ValueError(f"their width is {shape.shape[-1]}")


def _check_adapter(bank: Bank, params: Params) -> None:
    """Raises ValueError if the bank's adapters do not fit the layers of the backbone."""
    embedding, kernels = params["token_embedder"]["embedding"], layer_kernels(params)
    init = lambda key: bank.method.init(key, Runs(["any"]), InitContext(embedding, kernels=kernels))  # noqa: E731
    expected = flatten(jax.eval_shape(init, jax.random.key(0)))
    found = flatten(bank.arrays[PROMPT])
    match_exactly(
        {name: leaf.shape[1:] for name, leaf in expected.items()},
        {name: leaf.shape[1:] for name, leaf in found.items()},
        "The adapter of each run",
        standard="the layers of the backbone",
        advice=artifacts.COPY_AGAIN,
    )


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
            f"The backbone {backbone} has no usable vocabulary beside it. Set --vocabulary to a "
            f"SentencePiece model, a tokenizer.json, a folder with one, or byt5. Cause: {error}"
        ) from error
