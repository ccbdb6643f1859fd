"""A tiny T5 with bytes for words, artefacts for it, and what the training model says of them."""

from __future__ import annotations

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpt_jax import artefacts, batches
from mpt_jax.bank import Bank
from mpt_jax.models import PromptedEncoderDecoder
from mpt_jax.predict.backbone import Backbone
from mpt_jax.predict.server import Limits, Server
from mpt_jax.prompts import get_method
from mpt_jax.prompts.attempt import ATTEMPT
from mpt_jax.prompts.crosspt import CrossPT
from mpt_jax.prompts.mpt import MPT
from mpt_jax.runs import Runs
from mpt_jax.tokenizers import ByteVocabulary
from tests import tiny

VOCABULARY = ByteVocabulary()
CONFIG = tiny.config(vocab_size=384)
LIMITS = Limits(input_length=24, target_length=12, batch_size=4)
METHOD = MPT(tiny.PROMPT)
# Prompts of 3, 6 and 4 positions.
SEVERAL_LENGTHS = CrossPT(
    2,
    tiny.SOURCES,
    "private_cat",
    "softmax",
    private_length=dict(zip(tiny.RUNS.run_names, (1, 4, 2), strict=True)),
)
# (method, folded): what a bank can hold.
KINDS = {
    "factors": (METHOD, False),
    "folded": (METHOD, True),
    # A low temperature, so that texts differ in their weights.
    "attempt": (ATTEMPT(tiny.PROMPT, tiny.SOURCES, width=8, temperature=2.0), False),
    "crosspt": (CrossPT(tiny.PROMPT, tiny.SOURCES, top_k=1), False),
    "crosspt, folded": (CrossPT(tiny.PROMPT, tiny.SOURCES, share="learned"), True),
    "crosspt by the text": (
        CrossPT(tiny.PROMPT, tiny.SOURCES, router="attention", width=8, temperature=2.0),
        False,
    ),
    "several lengths": (SEVERAL_LENGTHS, False),
    "several lengths, folded": (SEVERAL_LENGTHS, True),
}


def model(runs: Runs = tiny.RUNS, method: Any = METHOD) -> PromptedEncoderDecoder:
    """A model as training has it, its rows known to the compiler."""
    return tiny.model(runs, method, CONFIG, output_vocabulary=VOCABULARY)


@functools.cache
def backbone() -> Backbone:
    """The backbone alone, in the dtype it was made in."""
    params = {k: v for k, v in tiny.params(model()).items() if k != "prompt"}
    digest = artefacts.embedding_digest(params["token_embedder"]["embedding"])
    return Backbone(CONFIG, params, VOCABULARY, digest, artefacts.vocabulary_digest(VOCABULARY))


def artefact(
    folder: Any,
    names: tuple[str, ...] = tiny.RUNS.run_names,
    seed: int = 0,
    method: Any = METHOD,
    groups: str = "joint",
):
    """An artefact of random prompts of some tasks, read back."""
    runs = Runs(names, groups=groups)
    artefacts.save_artefact(
        folder,
        method,
        tiny.params(model(runs, method), seed)["prompt"],
        runs,
        embedding_sha256=backbone().embedding_sha256,
        vocabulary_sha256=backbone().vocabulary_sha256,
        backbone="tiny",
        step=1,
    )
    return artefacts.load_artefact(folder)


def of_kind(folder: Any, kind: str) -> artefacts.Artefact:
    """An artefact of one of the `KINDS`; each task of it has sources, or an attention, of its own
    unless it is MPT's."""
    method, _ = KINDS[kind]
    groups = "joint" if method.name == "mpt" else "independent"
    return artefact(folder, method=method, groups=groups)


def server(folder: Any, kind: str = "factors") -> Server:
    """A server of one artefact."""
    return Server(Bank([of_kind(folder, kind)], folded=KINDS[kind][1]), backbone(), LIMITS)


@functools.cache
def _programs(runs: Runs, name: str, config: str) -> tuple[Any, Any]:
    trained = model(runs, get_method(name)(**json.loads(config)))
    return jax.jit(trained.predict_batch_with_aux), jax.jit(trained.forward)


def expected(found: artefacts.Artefact, task: str, text: str, target: str | None = None):
    """What the training model says of one example in a batch of its own, at a length that the
    server has not: the decoded text and its log probability, or that of a target."""
    ids = [*VOCABULARY.encode(text), 1]
    goal = () if target is None else [*VOCABULARY.encode(target), 1]
    example = batches.Example(ids, goal, found.runs.row(task))
    lengths = found.method.prompt_lengths(found.runs)
    batch = batches.unpacked(
        [example], lengths, LIMITS.input_length + 3, len(goal) or LIMITS.target_length
    )
    batch = tiny.arrays(batch)
    config = json.dumps(found.method.config())
    predict, forward = _programs(found.runs, found.method.name, config)
    params = {**backbone().params, "prompt": found.params}
    if target is None:
        ids, found = predict(params, batch)
        return VOCABULARY.decode(np.asarray(ids)[0].tolist()), float(found["scores"][0])
    logged = jax.nn.log_softmax(jnp.asarray(forward(params, batch).logits)[0])
    return float(sum(logged[i, token] for i, token in enumerate(goal)))
