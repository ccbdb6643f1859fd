"""A tiny T5 with bytes for words, artefacts for it, and what the training model says of them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpt_jax import artefacts, batches
from mpt_jax.bank import Bank
from mpt_jax.models import PromptedEncoderDecoder
from mpt_jax.predict.backbone import Backbone
from mpt_jax.predict.server import Limits, Server
from mpt_jax.prompts.mpt import MPT
from mpt_jax.runs import Runs
from mpt_jax.tokenizers import ByteVocabulary
from tests import tiny

VOCABULARY = ByteVocabulary()
CONFIG = tiny.config(vocab_size=384)
LIMITS = Limits(input_length=24, target_length=12, batch_size=4)


@functools.cache
def model(names: tuple[str, ...] = tiny.RUNS.run_names) -> PromptedEncoderDecoder:
    """A model as training has it, its rows known to the compiler."""
    return tiny.model(Runs(names), MPT(tiny.PROMPT), CONFIG, output_vocabulary=VOCABULARY)


@functools.cache
def backbone() -> Backbone:
    """The backbone alone, in the dtype it was made in."""
    params = {k: v for k, v in tiny.params(model()).items() if k != "prompt"}
    digest = artefacts.embedding_digest(params["token_embedder"]["embedding"])
    return Backbone(CONFIG, params, VOCABULARY, digest, artefacts.vocabulary_digest(VOCABULARY))


def artefact(folder: Any, names: tuple[str, ...] = tiny.RUNS.run_names, seed: int = 0):
    """An artefact of random prompts of some tasks, read back."""
    method, runs = MPT(tiny.PROMPT), Runs(names)
    artefacts.save_artefact(
        folder,
        method,
        tiny.params(model(names), seed)["prompt"],
        runs,
        embedding_sha256=backbone().embedding_sha256,
        vocabulary_sha256=backbone().vocabulary_sha256,
        backbone="tiny",
        step=1,
    )
    return artefacts.load_artefact(folder)


def server(folder: Any) -> Server:
    """A server of one artefact."""
    return Server(Bank([artefact(folder)]), backbone(), LIMITS)


@functools.cache
def _programs(names: tuple[str, ...]) -> tuple[Any, Any]:
    trained = model(names)
    return jax.jit(trained.predict_batch_with_aux), jax.jit(trained.forward)


def expected(found: artefacts.Artefact, task: str, text: str, target: str | None = None):
    """What the training model says of one example in a batch of its own, at a length that the
    server has not: the decoded text and its log probability, or that of a target."""
    ids = [*VOCABULARY.encode(text), 1]
    goal = () if target is None else [*VOCABULARY.encode(target), 1]
    example = batches.Example(ids, goal, found.runs.row(task))
    length = len(goal) or LIMITS.target_length
    batch = tiny.arrays(batches.unpacked([example], tiny.PROMPT, LIMITS.input_length + 3, length))
    predict, forward = _programs(found.runs.run_names)
    params = {**backbone().params, "prompt": found.params}
    if target is None:
        ids, found = predict(params, batch)
        return VOCABULARY.decode(np.asarray(ids)[0].tolist()), float(found["scores"][0])
    logged = jax.nn.log_softmax(jnp.asarray(forward(params, batch).logits)[0])
    return float(sum(logged[i, token] for i, token in enumerate(goal)))
