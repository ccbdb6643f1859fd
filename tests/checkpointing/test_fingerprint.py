"""The fingerprint's digest of the backbone and record of data, compared when a job resumes or a
checkpoint is read."""

from __future__ import annotations

import functools
import json

import pytest

from mpt_jax.checkpointing import fingerprint
from mpt_jax.checkpointing.fingerprint import check_can_restore, check_can_resume
from mpt_jax.training.optimizers import PromptOptimizer, sgd
from mpt_jax.training.schedules import Schedule

OURS = {"embedding_sha256": "e", "backbone_sha256": "b", "random_seed": 0, "data": {}}


@pytest.mark.parametrize("check", [check_can_resume, check_can_restore])
def test_check_other_weights_same_embedding_error_shows_both(check):
    with pytest.raises(ValueError, match="RUN .*backbone_sha256: saved 'a', current 'b'"):
        check(OURS, OURS | {"backbone_sha256": "a"}, "RUN")


@pytest.mark.parametrize("check", [check_can_resume, check_can_restore])
@pytest.mark.parametrize("saved", [{}, {"backbone_sha256": None}])
def test_check_saved_without_digest_compares_embedding_and_warns(check, saved, caplog):
    old = {"embedding_sha256": "e", "random_seed": 0, "data": {}} | saved
    with caplog.at_level("WARNING", logger="absl"):
        check(OURS, old, "RUN")
    (warning,) = caplog.messages
    assert warning.startswith("RUN records no backbone_sha256") and "only the" in warning
    with pytest.raises(ValueError, match="embedding_sha256: saved 'f', current 'e'"):
        check(OURS, old | {"embedding_sha256": "f"}, "RUN")


@pytest.mark.parametrize("check", [check_can_resume, check_can_restore])
def test_check_digest_switched_off_compares_embedding(check, caplog):
    with caplog.at_level("WARNING", logger="absl"):
        check(OURS | {"backbone_sha256": None}, OURS, "RUN")
    assert not caplog.messages, "switching it off was logged when the backbone was loaded"


T5 = {"mlp_activations": ["relu"], "relative_attention_max_distance": 128}


@pytest.mark.parametrize("check", [check_can_resume, check_can_restore])
def test_check_other_configuration_of_backbone_error_shows_only_the_field(check, caplog):
    ours, saved = OURS | {"backbone_config": T5}, OURS | {"backbone_config": {**T5, "new": 1}}
    with caplog.at_level("WARNING", logger="absl"):
        check(ours, saved, "RUN")
    assert not caplog.messages
    other = OURS | {"backbone_config": {**T5, "relative_attention_max_distance": 16}}
    field = r"\(backbone_config.relative_attention_max_distance: saved 16, current 128\)"
    with pytest.raises(ValueError, match=f"RUN was saved with another configuration {field}"):
        check(ours, other, "RUN")


@pytest.mark.parametrize("check", [check_can_resume, check_can_restore])
def test_check_saved_without_configuration_of_backbone_warns(check, caplog):
    with caplog.at_level("WARNING", logger="absl"):
        check(OURS | {"backbone_config": T5}, OURS, "RUN")
    (warning,) = caplog.messages
    assert warning.startswith("RUN records no backbone_config")


def made(rows: int | None, digest: str | None = None, **entry) -> dict:
    split = {"rows": rows} | ({"sha256": digest} if digest else {})
    return {"method": "mpt", "data": {"x": {"source": "s", "splits": {"train": split}, **entry}}}


def test_resume_same_data_passes_and_changed_rows_or_digest_raise(caplog):
    check_can_resume(made(3, "a" * 64), made(3, "a" * 64), "DIR")
    with pytest.raises(ValueError, match=r"data of the job in DIR has changed .*1,000 rows, curr"):
        check_can_resume(made(1001), made(1000), "DIR")
    message = r"saved 3 rows \(sha256 b{12}\), current 3 rows \(sha256 a{12}\)"
    with pytest.raises(ValueError, match=message):
        check_can_resume(made(3, "a" * 64), made(3, "b" * 64), "DIR")
    with pytest.raises(ValueError, match="source of task 'x': saved 'old:1', current 's'"):
        check_can_resume(made(3), made(3, source="old:1"), "DIR")
    assert not caplog.records


def test_resume_compares_only_what_both_records_have():
    ours, saved = made(3), made(3)
    saved["data"]["x"]["splits"]["validation"] = {"rows": 7}
    ours["data"]["y"] = ours["data"]["x"]
    check_can_resume(ours, saved, "DIR")


def test_resume_checkpoint_of_earlier_version_logs_warning(caplog):
    ours = made(3)
    saved = {"method": "mpt"}
    with caplog.at_level("WARNING", logger="absl"):
        check_can_resume(ours, saved, "DIR")
    (record,) = caplog.records
    assert "version of MPT-JAX that did not record its data" in record.getMessage()


def test_resume_with_another_dropout_rate_warns(caplog):
    """A checkpoint of a version without the rate was trained at 0, the default at the time."""
    for saved in ({"objective": "x"}, {"objective": "x", "dropout_rate": 0.0}):
        caplog.clear()
        check_can_resume({"objective": "x", "dropout_rate": 0.1}, saved, "DIR")
        assert "changed settings: dropout_rate: saved 0.0, current 0.1" in caplog.text
    caplog.clear()
    check_can_resume({"objective": "x", "dropout_rate": 0.0}, {"objective": "x"}, "DIR")
    assert "changed settings" not in caplog.text


# --- Functions among the optimizer's settings ----------------------------------------------------


def settings_of(**fields):
    return fingerprint._optimizer(
        PromptOptimizer({"task": Schedule(0.1, decay="constant")}, **fields)
    )


def test_optimizer_rule_is_recorded_by_its_name():
    found = settings_of(rule=sgd)
    assert found["rule"] == "sgd" and found["task.peak"] == 0.1
    assert json.loads(json.dumps(found)) == found
    assert settings_of()["rule"] != "sgd"


def test_optimizer_rule_with_arguments_is_recorded_with_them():
    """Not with an address, which another process would report as a change."""
    found = settings_of(rule=functools.partial(sgd, 0.9, weight_decay=0.01))["rule"]
    assert found == "sgd(0.9, weight_decay=0.01)"
    again = settings_of(rule=functools.partial(functools.partial(sgd, 0.9), weight_decay=0.01))
    assert again["rule"] == found
    assert settings_of(rule=functools.partial(sgd, 0.8))["rule"] == "sgd(0.8)"


def test_resume_with_another_rule_warns(caplog):
    ours, saved = ({"optimizer": {"rule": name}} for name in ("sgd", "adam"))
    with caplog.at_level("WARNING", logger="absl"):
        check_can_resume({**ours, "data": {}}, {**ours, "data": {}}, "DIR")
        assert not caplog.messages
        check_can_resume({**ours, "data": {}}, {**saved, "data": {}}, "DIR")
    assert "rule" in caplog.text and "'adam'" in caplog.text and "'sgd'" in caplog.text
