"""Server answers compared with the training model; order, batches and recompilation."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.artifacts import artifacts
from mpt_jax.core.runs import Runs
from mpt_jax.prompts.attempt import ATTEMPT
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.prompts.sites import SiteContext, SitePrompts
from mpt_jax.runtime import malloc, paths
from mpt_jax.serving.predict.requests import Failure
from mpt_jax.serving.predict.server import Limits, Server, buckets
from mpt_jax.serving.prompt_bank import Bank
from tests.fixtures import saved_artifacts, serving_fixtures, tiny
from tests.fixtures.saved_artifacts import DIGESTS

TEXTS = ("a", "fine film", "of the year", "what a long text this", "ok", "b", "cc", "ddd", "eeeee")


@pytest.fixture
def server(tmp_path):
    return serving_fixtures.server(tmp_path / "artifact")


def ask(server, requests, **settings):
    reader = server.reader(**settings)
    lines = [json.dumps(request).encode() for request in requests]
    return server.answer([reader.read(line, i) for i, line in enumerate(lines, start=1)])


KINDS = [
    kind if kind in ("factors", "several lengths, folded")
    else pytest.param(kind, marks=pytest.mark.slow)
    for kind in serving_fixtures.KINDS
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_server_mixed_tasks_match_single_examples(kind, tmp_path):
    server = serving_fixtures.server(tmp_path / "artifact", kind)
    found = artifacts.load_artifact(tmp_path / "artifact")
    tasks = [found.runs.run_names[i % 3] for i in range(len(TEXTS))]
    requests = [{"task": t, "inputs": x} for t, x in zip(tasks, TEXTS, strict=True)]
    answers = ask(server, requests)
    assert [answer["line"] for answer in answers] == list(range(1, len(TEXTS) + 1))
    for answer, task, text in zip(answers, tasks, TEXTS, strict=True):
        prediction, score = serving_fixtures.expected(found, task, text)
        assert answer["prediction"] == prediction
        assert answer["score"] == pytest.approx(score, rel=1e-4)
    assert len({round(answer["score"], 3) for answer in answers}) == len(TEXTS)
    check_scores(server, found)


def check_scores(server, found):
    """Scores are log probabilities."""
    triples = [("alpha", "fine film", "yes"), ("beta", "fine film", "no"), ("gamma", "a", "maybe")]
    requests = [{"task": t, "inputs": x, "targets": y} for t, x, y in triples]
    answers = ask(server, requests, mode="score")
    for answer, (task, text, target) in zip(answers, triples, strict=True):
        assert answer["score"] == pytest.approx(
            serving_fixtures.expected(found, task, text, target), 1e-4
        )


def test_server_choices_return_best_choice_and_all_scores(server, tmp_path):
    found = serving_fixtures.artifact(tmp_path / "artifact")
    choices = ["yes", "no", "perhaps so", "?"]
    for mode in ("predict", "score"):
        requests = [{"task": t, "inputs": "x y", "choices": choices} for t in ("alpha", "gamma")]
        for answer, task in zip(ask(server, requests, mode=mode), ("alpha", "gamma"), strict=True):
            scores = [serving_fixtures.expected(found, task, "x y", choice) for choice in choices]
            np.testing.assert_allclose(answer["scores"], scores, rtol=1e-4)
            assert answer["prediction"] == choices[int(np.argmax(scores))]


def test_functions_predict_score_equals_score_of_its_ids(server):
    tokens = jnp.asarray([[*serving_fixtures.VOCABULARY.encode("ok"), 1]] * 3)
    rows, params = jnp.arange(3), serving_fixtures.backbone().params
    ids, scores = jax.jit(server.functions.predict)(params, server.bank.arrays, tokens, rows)
    again = jax.jit(server.functions.score)(params, server.bank.arrays, tokens, ids, rows)
    np.testing.assert_allclose(scores, again, rtol=1e-4)


def test_server_failures_keep_request_order(server):
    requests = [
        {"task": "alpha", "inputs": "a"},
        {"task": "alpah", "inputs": "a", "id": "mine"},
        {"task": "beta", "inputs": "a", "id": {"any": [1]}},
    ]
    first, second, third = ask(server, requests)
    assert "prediction" in first and first["line"] == 1
    assert second["id"] == "mine" and "Did you mean 'alpha'" in second["error"]
    assert third["id"] == {"any": [1]} and "prediction" in third
    assert server.answer([]) == []
    assert server.answer([Failure({"line": 9}, "no")]) == [{"line": 9, "error": "no"}]


def test_server_grown_bank_recompiles_once(server, tmp_path):
    requests = [{"task": "alpha", "inputs": "x" * (1 + i % 22)} for i in range(33)]
    ask(server, requests)
    # Inputs of up to 16 and of up to 24 tokens, in batches of 1 and 4.
    assert server._predict._cache_size() <= 4
    before = server._predict._cache_size()
    added = serving_fixtures.artifact(tmp_path / "more", ("delta",), seed=1)
    with pytest.raises(ValueError, match="'delta'"):
        server.bank.row("delta")
    # The artifact's own shared prompt exceeds the capacity of one group, once.
    server.bank.add(added)
    ask(server, requests)
    grown = server._predict._cache_size()
    assert before < grown <= 2 * before


def test_server_row_within_folded_capacity_compiles_nothing(tmp_path):
    bank = Bank([serving_fixtures.artifact(tmp_path / "artifact")], folded=True)
    server = Server(bank, serving_fixtures.backbone(), serving_fixtures.LIMITS)
    (before,) = ask(server, [{"task": "beta", "inputs": "ok"}])
    programs = server._predict._cache_size()
    added = serving_fixtures.artifact(tmp_path / "more", ("delta",), seed=1)
    bank.add(added)  # the fourth row of four
    (answer,) = ask(server, [{"task": "delta", "inputs": "ok"}])
    prediction, score = serving_fixtures.expected(added, "delta", "ok")
    assert (answer["prediction"], answer["score"]) == (prediction, pytest.approx(score, rel=1e-4))
    assert ask(server, [{"task": "beta", "inputs": "ok"}]) == [before]
    assert server._predict._cache_size() == programs == 1


def test_server_folded_methods_and_lengths_match_training_model(tmp_path):
    """MPT's prompts have 3 positions, and CrossPT's have 6."""
    first = serving_fixtures.artifact(tmp_path / "mpt", ("alpha", "beta"))
    longer = serving_fixtures.SEVERAL_LENGTHS.private_length["beta"]
    private = dataclasses.replace(serving_fixtures.SEVERAL_LENGTHS, private_length=longer)
    second = serving_fixtures.artifact(tmp_path / "crosspt", ("gamma",), 1, private)
    server = Server(
        Bank([first, second], folded=True), serving_fixtures.backbone(), serving_fixtures.LIMITS
    )
    answers = ask(server, [{"task": t, "inputs": "ok"} for t in tiny.RUNS.run_names])
    for found, task, answer in zip(
        (first, first, second), tiny.RUNS.run_names, answers, strict=True
    ):
        prediction, score = serving_fixtures.expected(found, task, "ok")
        assert answer["prediction"] == prediction
        assert answer["score"] == pytest.approx(score, rel=1e-4)


@pytest.mark.parametrize("folded", [False, True])
def test_server_single_shorter_prompt_matches_training_model(folded, tmp_path):
    """A fleet writes such an artifact for each run."""
    found = serving_fixtures.artifact(
        tmp_path / "artifact", ("gamma",), method=serving_fixtures.SEVERAL_LENGTHS
    )
    assert found.prompt_length < found.method.prompt_length
    server = Server(
        Bank([found], folded=folded), serving_fixtures.backbone(), serving_fixtures.LIMITS
    )
    (answer,) = ask(server, [{"task": "gamma", "inputs": "ok"}])
    # In the artifact of all three rows, gamma's prompt has the same length.
    wide = serving_fixtures.artifact(tmp_path / "wide", method=serving_fixtures.SEVERAL_LENGTHS)
    for name in ("private", "router"):
        wide.params[name] = wide.params[name].at[2].set(found.params[name][0])
    wide.params["sources"] = found.params["sources"]
    prediction, score = serving_fixtures.expected(wide, "gamma", "ok")
    assert (answer["prediction"], answer["score"]) == (prediction, pytest.approx(score, rel=1e-4))


def test_buckets_double_up_to_limit():
    assert buckets(16, 100) == [16, 32, 64, 100]
    assert buckets(1, 32, 4) == [1, 4, 16, 32]
    assert buckets(16, 16) == buckets(32, 16) == [16]


def test_server_keeps_freed_memory(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(malloc, "keep_freed_memory", lambda: kept.append("freed memory"))
    serving_fixtures.server(tmp_path / "artifact")
    assert kept == ["freed memory"]


def test_limits_zero_size_fails():
    with pytest.raises(ValueError, match="batch_size is 0"):
        Limits(batch_size=0)


def test_server_score_that_is_not_finite_fails_its_line(server):
    """NaN in one norm of the backbone: every score is NaN, which is not JSON."""
    nan = jax.tree.map(jnp.copy, server.backbone.params)
    nan["decoder"]["decoder_norm"]["scale"] = (
        nan["decoder"]["decoder_norm"]["scale"].at[0].set(jnp.nan)
    )
    server.backbone = server.backbone._replace(params=nan)
    requests = [
        {"task": "alpha", "inputs": "ok"},
        {"task": "alpha", "inputs": "ok", "choices": ["a", "b"]},
    ]
    for answer in ask(server, requests):
        assert answer["error"].startswith("The score is NaN or infinite (")
        assert set(answer) == {"line", "error"}
    (scored,) = ask(server, [{**requests[0], "targets": "a"}], mode="score")
    assert "(nan)" in scored["error"]


@pytest.mark.parametrize(
    ("method", "width", "says"),
    [
        (PromptTuning(3), 1, "their width is 1. Copy the artifact again"),
        (PromptTuning(3), 129, "their width is 129. "),
        (ATTEMPT(3, ("a",)), 129, ""),  # the attention cannot read the embeddings
        (SitePrompts(PromptTuning(3)), 128, "An artifact with prompts for text_context has no"),
    ],
)
def test_load_prompts_that_do_not_fit_the_backbone_fail(method, width, says, tmp_path):
    """With the digests of the shipped T5."""
    shipped = artifacts.load_artifact(paths.SHIPPED / "tiny_t5" / "mpt_source")
    digests = {name: value for name, value in shipped.config.items() if name in DIGESTS}
    runs = Runs(["a"])
    params = method.init(jax.random.key(0), runs, SiteContext(jnp.ones((5000, width))))
    folder = saved_artifacts.save(tmp_path / "a", method, params, runs, **digests)
    with pytest.raises(ValueError, match=f"do not fit the backbone, whose width is 128: {says}"):
        Server.load([str(folder)])
