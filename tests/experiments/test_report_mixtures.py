"""Report of methods that mix prompts: weights and entropies by hand, and missing data."""

import math
import re

import numpy as np
import pytest

from mpt_jax.core.runs import Runs
from mpt_jax.data.sampling import EqualQuotas
from mpt_jax.experiments.report import analysis
from mpt_jax.prompts.attempt import ATTEMPT
from mpt_jax.prompts.crosspt.crosspt import CrossPT
from mpt_jax.prompts.crosspt.routing import Annealing
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.training.optimizers import PromptOptimizer
from mpt_jax.training.schedules import Schedule
from tests.fixtures import training_runs
from tests.fixtures.report_folders import (
    H,
    P,
    Reader,
    page_of,
    result,
    titles,
    write_artifact,
    write_lines,
)

SECTION = "What prompts are mixed from"
SOURCES = ("toy_mnli", "toy_qqp")
RUNS = Runs(("toy_rte", "toy_rte", "toy_cb"), ("rte_s0", "rte_s1", "cb_s0"), "independent")


def crosspt(*first, runs=RUNS, **settings):
    """Returns CrossPT over two sources, with parameters that give the first these weights."""
    method = CrossPT(P, SOURCES, router="softmax", **settings)
    rng, longest = np.random.default_rng(0), max(method.prompt_lengths(runs))
    private = longest - P if method.compose_by == "private_cat" else P
    params = {
        "sources": rng.normal(size=(runs.num_groups, 2, P, H)),
        "private": rng.normal(size=(runs.num_rows, private, H)),
        "router": np.array([[math.log(weight / (1 - weight)), 0.0] for weight in first]),
    }
    return method, params, runs


def attempt(runs=RUNS):
    rng = np.random.default_rng(0)
    shapes = {"sources": (2, P, H), "target": (runs.num_rows, P, H)}
    shapes |= {"down": (3, H, 2), "up": (3, 2, H), "norm_scale": (3, H), "norm_bias": (3, H)}
    return ATTEMPT(P, SOURCES, width=2), {k: rng.normal(size=v) for k, v in shapes.items()}, runs


def entropy(*weights):
    return -sum(weight * math.log(weight) for weight in weights)


def section(text):
    """Returns the section about mixtures."""
    return text.split(f"<h2>{SECTION}</h2>")[1].split("</section>")[0]


def numbers(drawing):
    return [float(x) for x in re.findall(r">(\d\.\d\d)<", drawing)]


def two(root, folder):
    """Returns results of a reference without folders and of a method with a folder."""
    return [result("MPT", rte=[1.0], cb=[1.0]), result("Mixed", rte=[2.0], cb=[2.0], folder=folder)]


# --- Weights -------------------------------------------------------------------------------------


def test_mixture_weights_fixed_prompts_equal_served_weights(tmp_path):
    write_artifact(tmp_path / "m", *crosspt(0.75, 0.45, 0.2))
    text = section(page_of(tmp_path, two(tmp_path, tmp_path / "m")))
    (drawing,) = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    h = [entropy(w, 1 - w) for w in (0.75, 0.45, 0.2)]
    rte = (h[0] + h[1]) / 2
    assert numbers(drawing) == [0.6, 0.4, round(rte, 2), 0.2, 0.8, round(h[2], 2)]
    assert Reader(text).alts == [
        "Weights of candidates, Mixed, k = 32. Largest: rte mnli 0.60, cb qqp 0.80. "
        f"Entropy {h[2]:.2f} to {rte:.2f} nats."
    ]
    # Two seeds of rte: 0.75 and 0.45 are 0.15 sqrt(2) apart from their mean.
    rows = re.findall(r'<tr><th scope="row">(\w+)</th>(.*?)</tr>', text)
    cells = {task: re.findall("<td>(.*?)</td>", row) for task, row in rows}
    assert cells["rte"][:2] == ["0.60 ± 0.21", "0.40 ± 0.21"] and cells["rte"][-1] == "2"
    assert cells["cb"][:2] == ["0.20", "0.80"] and cells["cb"][-1] == "1"
    assert "in its artifact and served" in text and "depend on the text" not in text


def test_mixture_heat_map_entropy_column_is_not_colored(tmp_path):
    write_artifact(tmp_path / "m", *crosspt(0.75, 0.45, 0.2))
    text = section(page_of(tmp_path, two(tmp_path, tmp_path / "m")))
    patches = re.findall(r'<g id="[^"]*patch_\d+">\s*<path[^>]*style="fill: (#\w+)', text)
    assert len(patches) == 4, "two tasks by two candidates"
    assert len(set(patches)) == 4


def test_mixture_weights_several_folders_average_by_task(tmp_path):
    for folder, weight in (("s0", 0.75), ("s1", 0.45)):
        write_artifact(tmp_path / folder, *crosspt(weight, runs=Runs(["toy_rte"])))
    mixed = result("Mixed", rte=[2.0, 2.0])
    dirs = (str(tmp_path / "s0"), str(tmp_path / "s1"))
    mixed = type(mixed)(**{**vars(mixed), "model_dirs": dirs})
    text = section(page_of(tmp_path, [result("MPT", rte=[1.0, 1.0]), mixed]))
    assert numbers(text)[:2] == [0.6, 0.4] and "0.60 ± 0.21" in text


def test_mixture_weights_single_run_per_task_has_no_table(tmp_path):
    runs = Runs(["toy_rte", "toy_cb"], groups="independent")
    write_artifact(tmp_path / "m", *crosspt(0.75, 0.2, runs=runs))
    assert "<table>" not in section(page_of(tmp_path, two(tmp_path, tmp_path / "m")))


def test_attention_weights_come_from_last_line_of_each_run(tmp_path):
    write_artifact(tmp_path / "m", *attempt())
    names = (*SOURCES, "target")

    def line(step, folder="train", **runs):
        found = {"folder": folder, "step": step, "loss": 1.0}
        for run, (weights, entropy) in runs.items():
            pairs = zip(names, weights, strict=True)
            found |= {f"attention/{name}/{run}": weight for name, weight in pairs}
            found[f"attention_entropy/{run}"] = entropy
        return found

    lines = [
        line(5, rte_s0=((0.3, 0.3, 0.4), 1.09), rte_s1=((0.2, 0.7, 0.1), 0.8)),
        line(10, rte_s0=((0.5, 0.3, 0.2), 1.0), cb_s0=((0.1, 0.1, 0.8), 0.6)),
        line(10, "training_eval/toy_cb", cb_s0=((0.8, 0.1, 0.1), 0.1)),
    ]
    write_lines(tmp_path / "m" / "metrics.jsonl", lines)
    text = section(page_of(tmp_path, two(tmp_path, tmp_path / "m")))
    alts = Reader(text).alts
    # rte_s1 ended first: its last line counts. (0.5 + 0.2) / 2, and so on.
    assert numbers(text)[:8] == [0.35, 0.5, 0.15, 0.9, 0.1, 0.1, 0.8, 0.6]
    assert alts[0].startswith("Weights of candidates, Mixed, k = 32. Largest: rte qqp 0.50, cb ta")
    assert "They depend on the text" in text and "in its artifact and served" not in text
    assert alts[1:] == [
        "entropy, nats by step, k = 32, 5 steps. At the last step: Mixed 0.8.",
        "entropy, nats by step, k = 32, 10 steps. At the last step: Mixed 0.8.",
    ]


def test_constant_attention_weights_are_shown_from_artifact(tmp_path):
    rng = np.random.default_rng(0)
    params = {"sources": rng.normal(size=(2, P, H)), "target": rng.normal(size=(3, P, H))}
    write_artifact(tmp_path / "m", ATTEMPT(P, SOURCES, attention="constant"), params, RUNS)
    text = section(page_of(tmp_path, two(tmp_path, tmp_path / "m")))
    assert numbers(text)[:4] == [0.33, 0.33, 0.33, 1.1]


def test_entropy_unnormalized_weights_uses_shares():
    found = analysis.entropy(np.array([[0.2, 0.6], [3.0, 3.0], [0.0, 5.0]]))
    np.testing.assert_allclose(found, [entropy(0.25, 0.75), math.log(2), 0], atol=1e-12)


def test_mixture_section_without_mixing_methods_is_absent(tmp_path):
    write_artifact(tmp_path / "m", PromptTuning(P), {"table": np.ones((3, P, H))}, RUNS)
    text = page_of(tmp_path, two(tmp_path, tmp_path / "m"))
    assert SECTION not in titles(text) and "Weights of candidates" not in text


# --- Missing data --------------------------------------------------------------------------------


def test_attention_weights_without_metrics_are_noted_as_missing(tmp_path):
    write_artifact(tmp_path / "m", *attempt())
    text = page_of(tmp_path, two(tmp_path, tmp_path / "m"))
    assert SECTION not in titles(text)
    absent = text.split("What is not shown")[-1]
    assert "Weights of candidates, Mixed, k = 32: they depend on the text" in absent


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (attempt(), "MPT, k = 32: prompts of &#x27;attempt&#x27; depend on the text"),
        (
            crosspt(
                *(0.5, 0.5, 0.5),
                compose_by="private_cat",
                private_length={"rte_s0": 1, "rte_s1": 1, "cb_s0": 2},
            ),
            f"MPT, k = 32: prompts have {P + 1}, {P + 2} positions",
        ),
    ],
    ids=["by the text", "of several lengths"],
)
def test_target_prompts_not_comparable_are_noted_and_next_method_shown(tmp_path, made, words):
    write_artifact(tmp_path / "mpt", *made)
    write_artifact(tmp_path / "pt", PromptTuning(P), {"table": np.ones((3, P, H))}, RUNS)
    found = [
        result("PT", rte=[1.0], cb=[1.0], folder=tmp_path / "pt"),
        result("MPT", rte=[1.0], cb=[1.0], folder=tmp_path / "mpt"),
    ]
    text = page_of(tmp_path, found)
    assert f"Similarity of prompts, {words}" in text.split("What is not shown")[-1]
    assert "Cosine similarity of prompts, PT, k = 32, 2 tasks. Between tasks: 1.00 to 1.00." in (
        Reader(text).alts
    )
    alone = page_of(tmp_path, found[1:]).split("What is not shown")[-1]
    assert "no available run has an artifact whose prompts can be compared" in alone


def test_source_prompts_reading_text_are_noted_as_missing(tmp_path):
    method, params, runs = attempt()
    scores = {task: {"accuracy": 1.0} for task in runs.task_names}
    write_artifact(tmp_path / "pt_source", method, params, runs, scores=scores)
    text = page_of(tmp_path, [result("PT", rte=[1.0]), result("MPT", rte=[2.0])])
    assert "Similarity of prompts, Teachers (PT): prompts of" in text.split("What is not shown")[-1]


# --- A run ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["attempt", "crosspt"])
def test_mixture_section_of_trained_run_has_weights_and_entropy(kind, backbone, tmp_path):
    runs, names = Runs(training_runs.TASKS), training_runs.TASKS[:2]
    sources, folder = tmp_path / "sources", tmp_path / "m"
    training_runs.run(
        backbone, sources, training_runs.build(PromptTuning(training_runs.P)), steps=1
    )
    method = {
        "attempt": ATTEMPT(training_runs.P, names, width=2),
        "crosspt": CrossPT(training_runs.P, names, annealing=Annealing(steps=2)),
    }[kind]
    labels = ("source", "private", "task", "router")
    rates = dict.fromkeys(labels, Schedule(0.1, decay="constant"))
    model = training_runs.build(method, runs, optimizer=PromptOptimizer(rates, absent_tasks="hold"))
    origins = {"artifact": str(sources / "artifact")}
    data = training_runs.dataset(runs, EqualQuotas(training_runs.BATCH, 1))
    training_runs.run(backbone, folder, model, steps=2, origins=origins, data=data)
    scores = {task: {"accuracy": [1.0]} for task in runs.task_names}
    found = type(result("M", rte=[1.0]))(
        "M", 32, scores, 1.0, 1.0, (str(folder),), (0,), training_runs.P, 900
    )
    text = section(page_of(tmp_path, [found]))
    weights, entropies = Reader(text).alts
    assert weights.startswith("Weights of candidates, M, k = 32. Largest: run_a ")
    assert re.fullmatch(r"entropy, nats by step, k = 32. At the last step: M [\d.e-]+.", entropies)
    shown = numbers(text)[: 3 * (len(method.candidates) + 1)]
    by_task = np.reshape(shown, (3, -1))
    np.testing.assert_allclose(by_task[:, :-1].sum(1), 1, atol=0.011)
    assert (by_task[:, -1] <= math.log(len(method.candidates)) + 0.005).all()
    assert ("depend on the text" in text) == method.reads_text
