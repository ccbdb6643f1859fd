"""Mutated files of every format are rejected, or read, and never end in another error."""

from __future__ import annotations

import collections
import dataclasses
import json
import random
import sys

import pytest

from benchmarks import fuzz, fuzz_formats, fuzz_mutations
from benchmarks.fuzz import DIFFERS, EQUAL, FAILED, REJECTED


def failures(found: list[fuzz.Outcome]) -> list[fuzz.Outcome]:
    return [outcome for outcome in found if outcome.outcome == FAILED]


def test_readers_of_200_mutated_files_raise_value_errors_only():
    found = list(fuzz.outcomes(0, range(200)))
    assert not failures(found)
    counts = collections.Counter(outcome.outcome for outcome in found)
    assert counts[REJECTED] > 100 and counts[EQUAL] > 20 and counts[DIFFERS] > 5


@pytest.mark.slow
def test_2000_mutated_files_of_all_formats_raise_value_errors_only():
    total = fuzz.Total(seed=3, inputs=2000, seconds=3600)
    found = fuzz.run(total, processes=1)
    assert found["inputs"] == 2000 and not total.failures
    assert set(found["by_format"]) == set(fuzz_formats.FORMATS)
    assert found["peak_megabytes"] < 2000


def test_values_that_differ_from_those_with_a_digest_are_failures(monkeypatch):
    def read(folder):
        return (folder / "file").read_text()

    kind = fuzz_formats.Format(lambda folder: (folder / "file").write_text("[1]"), read)
    monkeypatch.setitem(fuzz_formats.FORMATS, "example", kind)
    assert not failures(list(fuzz.outcomes(0, range(20), ("example",))))
    digested = dataclasses.replace(kind, has_digest=True)
    monkeypatch.setitem(fuzz_formats.FORMATS, "example", digested)
    found = failures(list(fuzz.outcomes(0, range(20), ("example",))))
    assert found and {x.error for x in found} == {"other values were read without an error"}


@pytest.mark.parametrize("changes_folder", [False, True])
def test_each_input_has_one_mutated_file(monkeypatch, changes_folder):
    seen = []

    def write(folder):
        for name in "abc":
            (folder / name).write_text("[1, 2, 3]")

    def read(folder):
        seen.append(sum(path.read_bytes() != b"[1, 2, 3]" for path in folder.iterdir()))
        if changes_folder:
            (folder / "a").write_text("read")
        return ""

    kind = fuzz_formats.Format(write, read, changes_folder=changes_folder)
    monkeypatch.setitem(fuzz_formats.FORMATS, "example", kind)
    list(fuzz.outcomes(0, range(50), ("example",)))
    assert set(seen) <= {0, 1} and seen.count(1) > 30


@pytest.mark.parametrize("error", [TypeError, ZeroDivisionError, MemoryError, RecursionError])
def test_other_errors_of_a_reader_are_failures(tmp_path, monkeypatch, error):
    def read(folder):
        if (folder / "file").read_bytes() != b"{}":
            raise error
        return ""

    kind = fuzz_formats.Format(lambda folder: (folder / "file").write_bytes(b"{}"), read)
    monkeypatch.setitem(fuzz_formats.FORMATS, "example", kind)
    found = list(fuzz.outcomes(0, range(5), ("example",)))
    assert failures(found) and error.__name__ in failures(found)[0].error


def test_limited_block_ends_with_a_memory_error():
    with fuzz.limited(2**28), pytest.raises(MemoryError):
        bytearray(2**30)
    assert len(bytearray(2**29)) == 2**29


def test_a_process_that_crashes_is_a_failure_and_others_are_read(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    total = fuzz.Total(seed=0, inputs=2, seconds=60)
    assert fuzz.run(total, processes=1)["outcomes"] == {FAILED: 2}
    assert [outcome.error for outcome in total.failures] == ["a crash", "a crash"]


def test_mutations_are_those_of_the_seed_and_change_json_values():
    content = json.dumps({"groups": [0, 1], "names": ["a", "b"], "step": 3}).encode()
    first, again = (
        [fuzz_mutations.mutate(content, random.Random(seed), "") for seed in range(300)]
        for _ in range(2)
    )
    assert first == again and len(set(first)) > 200
    values = [
        fuzz_mutations.changed_value(json.loads(content), random.Random(i)) for i in range(99)
    ]
    assert any("groups" not in value for value in values if isinstance(value, dict))
    assert any(value.get("step") != 3 for value in values if isinstance(value, dict))
