"""Tables of tokenized examples: the share of unknown tokens."""

import pytest

from mpt_jax.data import token_reading, token_tables, vocabularies
from mpt_jax.runtime.paths import SHIPPED
from tests.fixtures import memory_tasks

TOY = vocabularies.load(str(SHIPPED / "toy.model"), 16)
HEBREW = "\N{HEBREW LETTER ALEF}"


def table(name, texts, vocabulary=TOY):
    task = memory_tasks.register(name, memory_tasks.listed(texts), vocabulary=vocabulary)
    return token_tables.ExampleTable(task, "train", None, seed=0), task


@pytest.mark.parametrize(
    ("inputs", "share", "level", "line"),
    [
        # Two pieces for each Hebrew word: a space and an unknown token.
        (
            [HEBREW, f"{HEBREW} {HEBREW}"],
            1 / 2,
            "WARNING",
            "50.0% of the tokens of inputs",
        ),
        (["film " * 30 + HEBREW], 1 / 32, "INFO", "3.1% of the tokens of inputs"),
        (["film " * 130 + HEBREW], 1 / 132, None, ""),
        (["film"], 0, None, ""),
    ],
)
@pytest.mark.parametrize("counted", [False, True])
def test_share_of_unknown_tokens_is_logged_by_its_size(
    counted, inputs, share, level, line, caplog, monkeypatch
):
    monkeypatch.setattr(token_reading, "_REPORTED", set())
    with caplog.at_level("INFO", logger="absl"):
        found, task = table("tab_unk", [(text, "good") for text in inputs])
        if counted:
            caplog.clear()
            monkeypatch.setattr(token_reading, "_REPORTED", set())
            dataset = task.get_dataset(None, "train", shuffle=False)
            assert token_reading.count_examples(dataset, task, "train") == (0, len(inputs))
        token_reading.report_unknown("tab_unk", "train", {"inputs": 1.0})  # once is enough
    assert found.unknown == {"inputs": pytest.approx(share), "targets": 0}
    lines = [record for record in caplog.records if "tab_unk" in record.getMessage()]
    assert [record.levelname for record in lines] == ([level] if level else [])
    for record in lines:
        assert record.getMessage().startswith(f"Task tab_unk, train split: {line}")


def test_unknown_targets_warn_by_name(caplog):
    table("tab_targets", [("film", HEBREW), ("film", "good")])
    assert "33.3% of the tokens of targets are <unk>" in caplog.text


def test_bytes_have_no_unknown_tokens(caplog):
    found, _ = table("tab_bytes", [(HEBREW, "good")], memory_tasks.VOCABULARY)
    assert found.unknown == {"inputs": 0, "targets": 0}
    assert "<unk>" not in caplog.text
