"""Model cards: their contents, the hub's front matter, and edited cards that are kept."""

from __future__ import annotations

import dataclasses
import json
import re
import types

import pytest
import seqio
import tensorflow as tf
import yaml
from etils import epath

from mpt_jax.artifacts import artifacts, model_card
from mpt_jax.artifacts.model_card import TO_FILL, Data, Facts, Split
from mpt_jax.core.runs import Runs
from mpt_jax.data import task_lookup
from mpt_jax.prompts.mpt import MPT
from mpt_jax.tasks import files, glue, splits, super_glue, toy  # noqa: F401 - registered
from tests.fixtures import tiny, training_runs
from tests.fixtures.saved_artifacts import save, save_example

CONFIG = {
    "method": "mpt",
    "method_config": {"prompt_length": 4, "rank": 2},
    "task_names": ["rte", "rte", "cb"],
    "run_names": ["rte_s1", "rte_s2", "cb_s1"],
    "groups": [0, 1, 0],
    "shapes": {"shared": [2, 4, 6], "task_left": [3, 4, 2], "task_right": [3, 2, 6]},
    "backbone": "google-t5/t5-base",
    "embedding_sha256": "e" * 64,
    "vocabulary_sha256": "v" * 64,
    "step": 120,
    "metrics": {
        "scores": {
            "rte_s1": {"accuracy": 61.5, "invalid": 0.0},
            "cb_s1": {"accuracy": 92.857142857, "f1": float("nan")},
        },
        "best_step": [120, 80],
    },
    "started_from": None,
    "versions": {"mpt_jax": "0.1.0", "jax": "0.10.2"},
}
FACTS = Facts(
    data={
        "rte_s1": Data("glue/rte:2.0.0", {"train": Split("train", 2490), "test": Split("x", 139)}),
        "cb_s1": Data("mine.csv", {"train": Split("", None)}),
    },
    trained_on={"rte_s1": (12, 2490), "cb_s1": (0, 250)},
    evaluated={"rte_s1": 138, "cb_s1": 1028},
    evaluated_split="validation",
    num_trainable=1108,
    git_revision="abc123+changes",
    packages={"seqio": "0.0.20", "tensorflow": None},
)


def cells(card: str) -> list[list[str]]:
    """Every line of every table."""
    lines = [line for line in card.splitlines() if line.startswith("| ")]
    return [re.split(r" (?<!\\)\| ?", line.removeprefix("| "))[:-1] for line in lines]


def front_matter(card: str) -> dict:
    opening, matter, _ = card.split("---\n", 2)
    assert opening == ""
    return yaml.safe_load(matter)


def test_model_card_front_matter_has_hub_fields():
    card = model_card.text(CONFIG, FACTS)
    assert front_matter(card) == {
        "base_model": "google-t5/t5-base",
        "library_name": "mpt_jax",
        "tags": ["prompt-tuning", "soft-prompt", "t5", "jax", "mpt"],
    }


@pytest.mark.parity
def test_model_card_hub_reader_parses_front_matter():
    from huggingface_hub import ModelCard  # a requirement of transformers

    read = ModelCard(model_card.text(CONFIG, FACTS))
    assert read.data.to_dict() == front_matter(read.content)
    assert read.text.startswith("\n# Soft prompts for 3 runs")


@pytest.mark.parametrize("name", ["./runs/backbones/t5-base", "tiny_t5", "gs://b/t5", "a/b/c"])
def test_model_card_backbone_path_is_not_base_model(name):
    """The hub rejects names that are not its own, so the author has to fill in the name."""
    card = model_card.text({**CONFIG, "backbone": name}, FACTS)
    assert "base_model" not in front_matter(card)
    assert f"# base_model: {TO_FILL}" in card
    assert ["backbone", f"`{name}`"] in cells(card)


def test_model_card_lists_artifact_facts():
    found = cells(model_card.text(CONFIG, FACTS))
    for line in (
        ["method", "`mpt`"],
        ["prompt length", "4"],
        ["rank", "2"],
        ["tasks", "`rte`, `cb`"],
        ["groups that share nothing", "2"],
        ["numbers in this artifact", "108"],  # 2*4*6 + 3*4*2 + 3*2*6
        ["trainable parameters", "1,108"],
        ["step", "120"],
        ["sha256 of its embedding, as bfloat16", f"`{'e' * 64}`"],
        ["sha256 of the vocabulary", f"`{'v' * 64}`"],
        ["jax", "0.10.2"],
        ["seqio", "0.0.20"],
        ["git revision", "`abc123+changes`"],
    ):
        assert line in found
    unknown = {"tensorflow", "sha256 of the prompts it started from"}
    assert not unknown & {line[0] for line in found}


def test_model_card_scores_have_example_count_and_step():
    card = model_card.text(CONFIG, FACTS)
    found = cells(card)
    assert ["`rte_s1`", "accuracy", "61.5", "138", "120"] in found
    assert ["`cb_s1`", "accuracy", "92.86", "1,028", "120"] in found
    assert ["`cb_s1`", "f1", "nan", "1,028", "120"] in found
    second = {**CONFIG["metrics"], "scores": {"rte_s2": {"accuracy": 50.0}}}
    found = cells(model_card.text({**CONFIG, "metrics": second}, FACTS))
    assert ["`rte_s2`", "accuracy", "50", "unknown", "80"] in found
    assert "Of the validation split. The step was selected by these scores" in card
    assert "Nothing was measured" in model_card.text({**CONFIG, "metrics": {}}, FACTS)


def test_model_card_undefined_metric_is_marked():
    found = {"f1": 0.0, "f1_undefined": 0.0, "matthews": 0.0, "matthews_undefined": 1.0}
    metrics = {**CONFIG["metrics"], "scores": {"rte_s1": found}}
    card = cells(model_card.text({**CONFIG, "metrics": metrics}, FACTS))
    shown = [line[1:3] for line in card if line[0] == "`rte_s1`" and line[3] == "138"]
    assert shown == [["f1", "0"], ["matthews", "0 (undefined)"]]


def test_model_card_says_which_predictions_were_constant():
    scores = {"rte_s1": {"accuracy": 81.25, "constant_prediction": 1.0}, "cb_s1": {"f1": 3.0}}
    card = model_card.text({**CONFIG, "metrics": {"scores": scores}}, FACTS)
    assert "**Every prediction was the same for `rte_s1`**, so the scores are those" in card
    assert [row[1] for row in cells(card) if row[0] == "`rte_s1`" and len(row) == 5][-1:] == [
        "accuracy"
    ]
    assert "constant_prediction" not in card
    assert "Every prediction" not in model_card.text(CONFIG, FACTS)


def test_model_card_lists_data_and_splits():
    card = model_card.text(CONFIG, FACTS)
    found = cells(card)
    assert ["`rte_s1`", "glue/rte:2.0.0", "train", "train", "2,490"] in found
    assert ["`cb_s1`", "mine.csv", "train", "", ""] in found
    assert ["`rte_s2`", "unknown", "", "", ""] in found
    assert "* `rte_s1`: trained on 2,490 examples, of which 12 were cut" in card
    assert "* `cb_s1`: trained on 250 examples.\n" in card


def test_model_card_unknown_sections_are_left_to_author():
    card = model_card.text(CONFIG, Facts())
    sections = dict(re.findall(r"^## (.*)\n\n(.*)", card, re.MULTILINE))
    for title in ("License", "Intended use", "Known limits and biases"):
        assert sections[title].startswith(f"**[{TO_FILL}]**")
    assert f"# license: {TO_FILL}\n" in card


def test_model_card_run_name_with_pipe_is_escaped():
    card = model_card.text({**CONFIG, "run_names": ["a|b\nc", "d", "e"]}, FACTS)
    assert "| `a\\|b c` | unknown |" in card


CROSSPT = {
    **CONFIG,
    "method": "crosspt",
    "method_config": {"length": 4, "sources": ["mnli", "qqp"], "router": "softmax"},
    "mixture": {
        "rte_s1": {"mnli": 0.75, "qqp": 0.25},
        "rte_s2": {"mnli": 0.5, "qqp": 0.5},
        "cb_s1": {"mnli": 0.0004, "qqp": 0.9996},
    },
}


def test_model_card_mixture_is_table_of_runs_by_sources():
    card = model_card.text(CROSSPT, FACTS)
    found = cells(card.split("## What prompts are mixed from")[1].split("\n## ")[0])
    assert found == [
        ["run", "`mnli`", "`qqp`"],
        ["---", "---", "---"],
        ["`rte_s1`", "0.750", "0.250"],
        ["`rte_s2`", "0.500", "0.500"],
        ["`cb_s1`", "0.000", "1.000"],
    ]
    for config in (CONFIG, {**CROSSPT, "mixture": None}):
        assert "mixed from" not in model_card.text(config, FACTS)


@pytest.mark.parametrize(
    ("changes", "call", "words"),
    [
        ({}, ".folded()`", "one prompt [positions, width] for each run."),
        (CROSSPT, ".folded()`", "one prompt [positions, width] for each run."),
        (
            {
                "method": "crosspt",
                "method_config": {
                    "length": 4,
                    "sources": ["mnli", "qqp"],
                    "compose_by": "private_cat",
                    "private_length": {"rte_s1": 2, "rte_s2": 2, "cb_s1": 6},
                },
            },
            ".plain()`",
            "each of its own length",
        ),
        (
            {
                "method": "attempt",
                "method_config": {"prompt_length": 4, "sources": ["mnli", "qqp"]},
            },
            "(FOLDER)`",
            "Prompts depend on the text",
        ),
    ],
    ids=["mpt", "crosspt", "several lengths", "by the text"],
)
def test_model_card_shows_call_that_reads_prompts(changes, call, words):
    card = model_card.text({**CONFIG, **changes}, FACTS).replace("\n", " ")
    assert f"load_artifact(FOLDER){call.removeprefix('(FOLDER)')} gives" in card and words in card
    assert (".folded()" in card) == (call == ".folded()`")


# --- Where data comes from -------------------------------------------------------------------


def test_data_of_split_parts_shows_index_ranges():
    sizes = {"train": 2490, "validation": 277}
    task = types.SimpleNamespace(
        source=splits.PartsSource("glue/rte:2.0.0", splits.halved(), sizes)
    )
    assert model_card.data_of(task) == Data(
        "glue/rte:2.0.0",
        {
            "train": Split("train", 2490),
            "validation": Split("validation, permuted, places 0 to half", 138),
            "test": Split("validation, permuted, places half to the end", 139),
        },
    )


def test_data_of_function_source_says_in_memory():
    def rows(split, shuffle_files=False, seed=None):
        del split, shuffle_files, seed
        return tf.data.Dataset.range(3)

    counts = {"train": 3}
    source = seqio.FunctionDataSource(rows, ["train"], num_input_examples=counts)
    task = types.SimpleNamespace(source=source)
    assert model_card.data_of(task) == Data(
        "made by a function, in memory", {"train": Split("", 3)}
    )


HALVES = {
    "validation": Split("validation, permuted, places 0 to half", 28),
    "test": Split("validation, permuted, places half to the end", 28),
}


@pytest.mark.parametrize(
    ("run", "name", "expected"),
    [
        (
            "cb_k4_s1",
            "super_glue/cb:1.0.2",
            {"train": Split("k = 4 rows of train, draw 1", 4), **HALVES},
        ),
        (
            "cb_k2_per_class_s3_dev",
            "super_glue/cb:1.0.2",
            {
                "train": Split("k = 2 rows of each label of train, draw 3", 6),
                "validation": Split(
                    "k = 2 rows of each label of validation "
                    "(validation, permuted, places 0 to half), draw 3",
                    6,
                ),
                "test": HALVES["test"],
            },
        ),
        ("cb_s1", "super_glue/cb:1.0.2", {"train": Split("train", 250), **HALVES}),
        (
            "sst2_k16_s0",
            "glue/sst2:2.0.0",
            {
                "train": Split(
                    "k = 16 rows of train (train, permuted, places 1000 to the end), draw 0", 16
                ),
                "validation": Split("train, permuted, places 0 to 1000", 1000),
                "test": Split("validation", 872),
            },
        ),
        (
            "toy_boolq_k4_s1",
            "made by a function, in memory",
            {
                "train": Split("k = 4 rows of train, draw 1", 4),
                "validation": Split("", 200),
                "test": Split("", 200),
            },
        ),
        (
            "toy_boolq_s1",
            "made by a function, in memory",
            {"train": Split("", 2000), "validation": Split("", 200), "test": Split("", 200)},
        ),
    ],
)
def test_data_of_few_shot_and_repeated_runs_names_task_data(run, name, expected):
    """Reads no data: neither data set is on this machine."""
    assert model_card.data_of(task_lookup.find_task(run)) == Data(name, expected)


def test_data_of_few_shot_file_task_names_file(tmp_path):
    lines = [json.dumps({"text": f"text {i}", "label": ("no", "yes")[i % 2]}) for i in range(6)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    files.register("mdc", inputs="{text}", targets="{label}", labels=("no", "yes"), train=path)
    data = model_card.data_of(task_lookup.find_task("mdc_k3_s0"))
    assert data == Data(str(path), {"train": Split("k = 3 rows of train, draw 0", 3)})


# --- In the artifact's folder ----------------------------------------------------------------


def test_save_artifact_writes_new_model_card_each_time(tmp_path):
    for step in (120, 240):
        save_example(tmp_path / "a", step=step, facts=FACTS)
        card = (tmp_path / "a" / "README.md").read_bytes()
        config = json.loads((tmp_path / "a" / "config.json").read_text())
        assert card.decode() == model_card.text(config, FACTS)
        assert ["step", str(step)] in cells(card.decode())
        assert model_card.is_generated(card)


@pytest.mark.parametrize(
    "edit",
    [
        lambda card: card.replace(b"[to be filled in by the author]", b"Apache-2.0", 1),
        lambda card: card + b"More.\n",
        lambda card: card.replace(b"\n", b"\r\n"),
        lambda card: card[: card.index(b"<!--")],
        lambda card: b"\xff not even text",
        lambda card: b"",
    ],
    ids=["a word", "at the end", "line ends", "no seal", "bytes", "emptied"],
)
def test_save_artifact_edited_model_card_is_kept(tmp_path, caplog, edit):
    save_example(tmp_path / "a")
    path = tmp_path / "a" / "README.md"
    edited = edit(path.read_bytes())
    assert edited != path.read_bytes()
    path.write_bytes(edited)
    with caplog.at_level("WARNING", logger="absl"):
        save_example(tmp_path / "a", step=240)
    assert path.read_bytes() == edited
    assert artifacts.load_artifact(tmp_path / "a").config["step"] == 240
    assert "README.md was edited, so it was kept" in caplog.text and "step 240" in caplog.text
    path.unlink()
    save_example(tmp_path / "a", step=360)
    assert ["step", "360"] in cells(path.read_text())


def test_for_folder_same_facts_return_same_card(tmp_path):
    folder = epath.Path(tmp_path)
    assert model_card.for_folder(folder, CONFIG, FACTS) == model_card.text(CONFIG, FACTS).encode()
    assert not list(tmp_path.iterdir()), "for_folder writes nothing itself"


def test_save_artifact_any_method_writes_model_card(tmp_path):
    model = tiny.model(Runs(["one"]), MPT(tiny.PROMPT))
    params = tiny.params(model)["prompt"]
    save(tmp_path / "a", model.prompt, params, model.runs, vocabulary_sha256=None)
    found = cells((tmp_path / "a" / "README.md").read_text())
    assert not any(line[0] == "sha256 of the vocabulary" for line in found)
    assert ["tasks", "`one`"] in found


def test_trained_run_model_card_has_data_and_example_counts(backbone, tmp_path):
    model, evaluated = training_runs.build(), training_runs.dataset(Runs(training_runs.TASKS))
    evaluated = dataclasses.replace(evaluated, split="validation", shuffle=False)
    training_runs.run(backbone, tmp_path, model, steps=2, infer_eval_dataset_cfg=evaluated)
    card = (tmp_path / "artifact" / "README.md").read_text()
    found = cells(card)
    made = "made by a function, in memory"
    for run in training_runs.TASKS:
        assert [f"`{run}`", made, "train", "", "10"] in found
        assert f"* `{run}`: trained on 10 examples.\n" in card
        (score,) = [line for line in found if line[:2] == [f"`{run}`", "accuracy"]]
        assert score[3:] == ["4", "2"]
    assert "Of the validation split." in card and "flatter" not in card
    trained = training_runs.P * 16 + 3 * (training_runs.P + 16)
    assert ["trainable parameters", str(trained)] in found
    record = json.loads((tmp_path / "run.jsonl").read_text())
    assert ["git revision", f"`{record['git_revision']}`"] in found
    assert ["jaxlib", record["packages"]["jaxlib"]] in found
