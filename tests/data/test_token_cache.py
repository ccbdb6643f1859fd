"""The cache of tokenized splits: what it keeps, what makes an entry again, and damage."""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import seqio
import tensorflow as tf
from etils import epath

from mpt_jax.data import (
    fingerprints,
    in_memory,
    preprocessors,
    token_cache,
    token_tables,
    vocabularies,
)
from mpt_jax.tasks import few_shot, file_readers, file_sources
from mpt_jax.tasks.toy_vocabulary import EXTRA_IDS, VOCABULARY_PATH

LENGTHS = {"inputs": 6, "targets": 4}
TEXTS = [("a good film and a fine day", "good"), ("a film", "bad"), ("the day was good", "good")]
# A user's module with a template, which calls a function of another module.
TEMPLATE = """
import tensorflow as tf
import tok_helpers

def template(ending):
    def one(row):
        return {**row, "inputs": tok_helpers.ended(row["inputs"], ending)}
    return lambda dataset: dataset.map(one)
"""
HELPERS = """
def ended(text, ending):
    return text + " " + ending
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "tokens"
    monkeypatch.setenv(token_cache.VARIABLE, str(folder))
    return folder


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A user's modules, on the path."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "tok_template.py").write_text(TEMPLATE)
    (tmp_path / "tok_helpers.py").write_text(HELPERS)
    yield importlib.import_module("tok_template")
    for name in ("tok_template", "tok_helpers"):
        sys.modules.pop(name, None)


@functools.cache
def vocabulary(extra_ids=EXTRA_IDS):
    return vocabularies.load(str(VOCABULARY_PATH), extra_ids=extra_ids)


def write(path: Path, texts=TEXTS) -> Path:
    path.write_text("".join(json.dumps({"x": x, "y": y}) + "\n" for x, y in texts))
    return path


def task(path: Path, name="tok_files", first=(), ids=EXTRA_IDS, template="{x}"):
    """A task of a file, registered again."""
    reader = functools.partial(
        file_readers.read,
        inputs=file_readers.Template("inputs", template),
        targets=file_readers.Template("targets", "{y}"),
        words={},
    )
    source = file_sources.Files(name, dict.fromkeys(("train", "test"), epath.Path(path)), reader)
    seqio.TaskRegistry.remove(name)
    return seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=[*first, *preprocessors.finish(name)],
        output_features=preprocessors.output_features(vocabulary(ids)),
    )


def table(found, split="train", lengths=LENGTHS, **settings):
    return token_tables.ExampleTable(found, split, lengths, seed=0, **settings)


def entries(cache: Path) -> list[str]:
    return sorted(os.listdir(cache)) if cache.exists() else []


def assert_same(one, other):
    assert one.num_overlong == other.num_overlong and one.counts == other.counts
    for name, values in one.values.items():
        np.testing.assert_array_equal(values, other.values[name])
        np.testing.assert_array_equal(one.offsets[name], other.offsets[name])
        assert values.dtype == other.values[name].dtype


def test_second_reading_tokenizes_nothing_and_maps_the_same_tokens(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "a.jsonl")
    monkeypatch.setenv(token_cache.VARIABLE, "")
    without = table(task(path))
    assert without.num_examples == 3 and without.num_overlong == 2 and not cache.exists()
    monkeypatch.setenv(token_cache.VARIABLE, str(cache))
    first = table(task(path))
    monkeypatch.setattr(in_memory, "encode", lambda *_: pytest.fail("tokenized again"))
    second = table(task(path))
    for found in (first, second):
        assert isinstance(found.values["inputs"], np.memmap) and found.num_bytes < 100
        assert_same(found, without)
    assert len(entries(cache)) == 1


def test_entry_does_not_depend_on_the_name_of_the_task(tmp_path, cache):
    path = write(tmp_path / "a.jsonl")
    one, other = table(task(path)), table(task(path, "tok_other"))
    assert len(entries(cache)) == 1
    ids = [preprocessors.task_id(name) for name in ("tok_files", "tok_other")]
    for found, identity in zip((one, other), ids, strict=True):
        assert found.values["task_ids"].tolist() == [~identity, identity, ~identity]


def test_few_shot_runs_have_own_entries_and_share_whole_splits(tmp_path, cache):
    task(write(tmp_path / "a.jsonl"))
    for seed in (0, 1):
        assert few_shot.register_run(f"tok_files_k2_s{seed}")
        found = seqio.TaskRegistry.get(f"tok_files_k2_s{seed}")
        assert table(found).num_examples == 2
        assert table(found, "test").num_examples == 3
    assert len(entries(cache)) == 3


def changed_file(path, module):
    return task(write(path, [("another", "text"), *TEXTS[1:]]), first=[module.template("x")])


def changed_function(path, module):
    (path.parent / "tok_template.py").write_text(TEMPLATE.replace("**row, ", "**row,  "))
    return task(path, first=[module.template("x")])


def changed_helper(path, module):
    (path.parent / "tok_helpers.py").write_text(HELPERS.replace('" "', '" , "'))
    return task(path, first=[module.template("x")])


CHANGES = {
    "file": changed_file,
    "code of the template": changed_function,
    "code that the template calls": changed_helper,
    "a value in the template": lambda path, module: task(path, first=[module.template("y")]),
    "preprocessors": lambda path, module: task(path),
    "text template": lambda p, m: task(p, first=[m.template("x")], template="film : {x}"),
    "vocabulary": lambda path, module: task(path, first=[module.template("x")], ids=7),
}


@pytest.mark.parametrize("change", CHANGES)
def test_change_makes_another_entry(change, tmp_path, cache, module):
    path = write(tmp_path / "a.jsonl")
    before = task(path, first=[module.template("x")])
    table(before)
    assert len(entries(cache)) == 1
    table(task(path, first=[module.template("x")]))
    assert len(entries(cache)) == 1, "registered again, and the same"
    found = table(CHANGES[change](path, module))
    assert len(entries(cache)) == 2, "of the change"
    assert found.num_examples == 3


def test_lengths_and_seed_make_other_entries_and_equal_splits_share_one(tmp_path, cache):
    found = task(write(tmp_path / "a.jsonl"))
    table(found)
    table(found, "test")  # of the same file
    assert table(found, lengths={"inputs": 3, "targets": 4}).num_overlong == 2
    table(found, lengths=None)
    token_tables.ExampleTable(found, "train", LENGTHS, seed=1)
    assert len(entries(cache)) == 4


def test_shuffled_limited_and_unknown_sources_are_not_cached(tmp_path, cache):
    found = task(write(tmp_path / "a.jsonl"))
    table(found, shuffle=True)
    assert table(found, limit=2).num_examples == 2
    columns = {"inputs": ["a film"], "targets": ["good"]}
    plain = found.replace(
        name="tok_function",
        source=seqio.FunctionDataSource(
            lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(columns),
            splits=["train"],
        ),
        preprocessors=preprocessors.finish("tok_function"),
    )
    assert table(plain).num_examples == 1
    constant = tf.constant("film")
    held = task(tmp_path / "a.jsonl", first=[lambda ds: ds.map(lambda x: {**x, "z": constant})])
    with pytest.raises(fingerprints.Unknown, match="it holds"):
        fingerprints.of_split(held, "train", {})
    assert not entries(cache)


# --- Damage, and folders that cannot be used -----------------------------------------------------


def flip(path):
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


def edited(**changes):
    def edit(path):
        entry = json.loads((path / "entry.json").read_text())
        entry["arrays"]["inputs"] |= changes
        (path / "entry.json").write_text(json.dumps(entry))

    return edit


DAMAGE = {
    "a flipped bit": lambda path: flip(path / "inputs"),
    "a flipped bit of offsets": lambda path: flip(path / "targets.offsets"),
    "cut": lambda path: (path / "inputs").write_bytes((path / "inputs").read_bytes()[:-1]),
    "a file is gone": lambda path: (path / "overlong").unlink(),
    "no JSON": lambda path: (path / "entry.json").write_text("{"),
    "huge": edited(size=2**60),
    "negative": edited(size=-1),
    "other arrays": lambda path: (path / "entry.json").write_text(
        json.dumps({"arrays": {"../../x": {"size": 1, "crc32": 1}}, "counts": {}})
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_entry_is_made_again_with_a_warning(damage, tmp_path, cache, caplog):
    path = write(tmp_path / "a.jsonl")
    expected = table(task(path))
    values = {name: np.array(x) for name, x in expected.values.items()}
    (name,) = entries(cache)
    DAMAGE[damage](cache / name)
    found = table(task(path))
    assert "damaged entry, which is made again" in caplog.text
    for feature, tokens in values.items():
        np.testing.assert_array_equal(found.values[feature], tokens)
    caplog.clear()
    assert_same(table(task(path)), found)
    assert "damaged" not in caplog.text and entries(cache) == [name]


def test_full_disk_and_folder_that_cannot_be_written_are_reported(
    tmp_path, cache, caplog, monkeypatch
):
    path = write(tmp_path / "a.jsonl")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(token_cache._Writer, "add", full)
        found = table(task(path))
    assert found.num_examples == 3 and not isinstance(found.values["inputs"], np.memmap)
    assert "No space left on device" in caplog.text and "Set MPT_JAX_TOKEN_CACHE" in caplog.text
    assert not entries(cache)
    monkeypatch.setenv(token_cache.VARIABLE, str(write(tmp_path / "file")))
    assert table(task(path)).num_examples == 3
    assert caplog.text.count("Tokens cannot be cached") == 2


def test_processes_that_write_one_entry_at_once_leave_one(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "a.jsonl")
    found = [task(path, f"tok_{i}") for i in range(4)]
    together = threading.Barrier(4)
    load = token_cache.load
    monkeypatch.setattr(
        token_cache, "load", lambda name: load(name) or (together.wait(), load(name))[1]
    )
    tables: list[token_tables.ExampleTable] = []
    threads = [threading.Thread(target=lambda t=t: tables.append(table(t))) for t in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tables) == 4 and len(entries(cache)) == 1
    for other in tables[1:]:
        np.testing.assert_array_equal(other.values["inputs"], tables[0].values["inputs"])


def test_unfinished_entry_of_a_killed_process_is_removed_after_a_day(tmp_path, cache):
    for name, age in (("old", 90000), ("new", 100)):
        (cache / f"{name}.unfinished").mkdir(parents=True)
        os.utime(cache / f"{name}.unfinished", (time.time() - age,) * 2)
    table(task(write(tmp_path / "a.jsonl")))
    assert [x for x in entries(cache) if "unfinished" in x] == ["new.unfinished"]
