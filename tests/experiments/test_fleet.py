"""Products of tasks, examples, seeds and settings: run names, bindings and data."""

from __future__ import annotations

import pytest

from mpt_jax.core import runs
from mpt_jax.experiments import fleet
from mpt_jax.experiments.fleet import Fleet
from mpt_jax.tasks import few_shot


def test_fleet_run_names_contain_only_differing_settings():
    several = Fleet(["rte", "boolq"], [4, 16], [0, 2], [0.1, 0.3])
    names = fleet.run_names(several)
    assert len(names) == 16 and names[:4] == [
        "rte_k4_s0_lr0.1", "rte_k4_s0_lr0.3", "rte_k4_s2_lr0.1", "rte_k4_s2_lr0.3",
    ]  # fmt: skip
    assert fleet.task_names(several) == ["rte"] * 8 + ["boolq"] * 8
    assert fleet.learning_rates(several) == [0.1, 0.3] * 8
    plain = Fleet(["rte"], [16], [1], [0.3], [0.4], ["mnli"])
    assert fleet.run_names(plain) == ["rte_k16_s1"]
    one_for_all = (fleet.learning_rates, fleet.task_learning_rates, fleet.start_from)
    assert [field(plain) for field in one_for_all] == [0.3, 0.4, "mnli"]
    assert fleet.run_names(Fleet(["rte", "cb"])) == ["rte", "cb"]
    assert fleet.run_names(Fleet(["rte"], seeds=[0, 1])) == ["rte_s0", "rte_s1"]
    assert fleet.run_names(Fleet(["rte"], [8])) == ["rte_k8_s0"]
    every = Fleet(["rte"], [4], [0], [0.5, 1e-5], [1, 2.5], ["average", "mnli"])
    assert fleet.run_names(every)[-3:] == [
        "rte_k4_s0_lr0.00001_tlr1_from_mnli",
        "rte_k4_s0_lr0.00001_tlr2.5_from_average",
        "rte_k4_s0_lr0.00001_tlr2.5_from_mnli",
    ]
    assert fleet.start_from(every)["rte_k4_s0_lr0.5_tlr1_from_mnli"] == "mnli"
    assert {runs.data_name(name) for name in fleet.run_names(every)} == {"rte_k4_s0"}


def test_fleet_per_class_is_part_of_run_names():
    """As `few_shot` and `image_few_shot` parse them."""
    several = Fleet(["pets", "cars"], [1, 16], [1, 2], [0.1, 0.3], per_class=True)
    names = fleet.run_names(several)
    assert len(names) == 16 and names[:3] == [
        "pets_k1_per_class_s1_lr0.1", "pets_k1_per_class_s1_lr0.3", "pets_k1_per_class_s2_lr0.1",
    ]  # fmt: skip
    assert {runs.data_name(name) for name in names if name.startswith("cars_k16")} == {
        "cars_k16_per_class_s1", "cars_k16_per_class_s2",
    }  # fmt: skip
    draw = few_shot.parse(runs.data_name(names[-1]))
    assert draw == few_shot.Draw("cars", 16, 2, per_class=True)
    assert fleet.task_names(several) == ["pets"] * 8 + ["cars"] * 8
    assert fleet.run_names(Fleet(["pets"], [4], per_class=True)) == ["pets_k4_per_class_s0"]
    without_draws = Fleet(["pets"], [None, 4], [3], per_class=True)
    assert fleet.run_names(without_draws) == ["pets_s3", "pets_k4_per_class_s3"]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tasks": []}, r"TARGET_TASKS must be a non-empty list, got \[\]"),
        ({"tasks": "rte"}, "must be a non-empty list, got 'rte'"),
        (
            {"tasks": ["rte"], "seeds": []},
            r"SEEDS must be a non-empty list, got \[\]",
        ),
        ({"tasks": ["rte", "rte"]}, "TARGET_TASKS lists 'rte' more than once"),
        ({"tasks": ["rte"], "learning_rates": [0.3, 0.3]}, "RATES lists 0.3 more than once"),
        ({"tasks": ["rte"], "shots": [0]}, "must be positive, got 0"),
        ({"tasks": ["rte"], "seeds": [-1]}, "not be negative, got -1"),
    ],
)
def test_fleet_invalid_field_raises(fields, says):
    with pytest.raises(ValueError, match=says):
        Fleet(**fields)


def test_fleet_equal_run_names_raise():
    with pytest.raises(ValueError, match="several runs named rte_k4_s1: "):
        _ = Fleet(["rte", "rte_k4"], [4, None], [1]).members


@pytest.mark.parametrize("task", ["qa_from_text", "nli_init_a"])
def test_fleet_task_named_like_settings_raises(task):
    """Its runs would have the examples, order and initial values of another name."""
    for fields in ({"tasks": [task], "shots": [4]}, {"tasks": ["rte", task], "seeds": [0, 1]}):
        with pytest.raises(ValueError, match=f"'{task}_.*parsed as '(qa|nli)' plus settings"):
            _ = Fleet(**fields).members


def test_fleet_members_are_cached():
    several = Fleet(["rte"], [4, 16])
    assert several.members is several.members and several == Fleet(["rte"], [4, 16])


def test_total_steps_task_steps_end_runs_early():
    several = Fleet(["rte", "boolq"], [4], [0, 1])
    assert fleet.total_steps(several, 50) == 50
    assert fleet.total_steps(several, 50, {"rte": 20}) == [20, 20, 50, 50]
    with pytest.raises(
        ValueError,
        match=r"TASK_STEPS\['rte'\] = 80 is not between 1 and TRAIN_STEPS = 50. .* set TRAIN_STEPS",
    ):
        fleet.total_steps(several, 50, {"rte": 80})
    with pytest.raises(
        ValueError, match="for every task of the fleet. Set TRAIN_STEPS = 30, the number"
    ):
        fleet.total_steps(several, 50, {"rte": 30, "boolq": 30})
    with pytest.raises(ValueError, match="fewer steps than TRAIN_STEPS = 50 .* every task"):
        fleet.total_steps(several, 50, {"rte": 20, "boolq": 30})
    with pytest.raises(ValueError, match="'cb'.*boolq, rte"):
        fleet.total_steps(several, 50, {"cb": 20})


def test_data_name_strips_settings():
    cases = {
        "rte_k16_s1_lr0.3": "rte_k16_s1",
        "rte_lr2_tlr0.4_from_average": "rte",
        "rte_k4_s0_from_mnli_init_text": "rte_k4_s0",
        "boolq_k16_s1_from_rte_lr0.3": "boolq_k16_s1",  # the start's name contains settings
        "boolq_k16_s1_lr0.1_from_rte_k4_s0_lr0.3_tlr0.4": "boolq_k16_s1",
        "boolq_from_rte_lr0.3_from_mnli_init_text": "boolq",
        "rte_k16_s1": "rte_k16_s1",
        "toy_sst2_s0": "toy_sst2_s0",
        "rte_lr": "rte_lr",
        "rte_lr0.3_dev": "rte_lr0.3_dev",
        "rte_init_words_v1.1": "rte",
    }
    assert {name: runs.data_name(name) for name in cases} == cases
