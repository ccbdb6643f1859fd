"""Splits: the permutation, compared with torch, and sources read from disk."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import seqio

from mpt_jax.tasks import splits
from mpt_jax.tasks.splits import Part, PartsSource
from tests.fixtures import tfds_data

CB = "super_glue/cb:1.0.2"


@pytest.mark.parametrize(
    ("size", "first"),
    [
        (10, [2, 6, 1, 8, 4, 5, 0, 9, 3, 7]),
        (56, [22, 8, 36, 39, 34, 28]),
        (104, [70, 20, 30, 58, 2, 0]),
        (277, [207, 84, 253, 243, 190, 28]),
        (67_349, [6677, 49712, 38268, 32909, 23395, 66940]),
    ],
)
def test_permutation_matches_published_values(size, first):
    found = splits.permutation(size)
    assert found[: len(first)].tolist() == first
    assert np.array_equal(np.sort(found), np.arange(size))


def test_permutation_of_zero_or_one_rows():
    assert [splits.permutation(size).tolist() for size in (0, 1)] == [[], [0]]


def reference(size: int, seed: int) -> list[int]:
    """Returns the permutation by Python's Mersenne Twister, seeded as by its authors."""
    state = [seed]
    for i in range(1, 624):
        state.append((1812433253 * (state[-1] ^ (state[-1] >> 30)) + i) & 0xFFFFFFFF)
    twister = random.Random()
    twister.setstate((3, (*state, 624), None))
    left, order = list(range(size)), []
    for i in range(size - 1):
        there = i + twister.getrandbits(32) % (size - i)
        left[i], left[there] = left[there], left[i]
        order.append(left[i])
    return order + left[size - 1 :]


@pytest.mark.parametrize("seed", [0, 42, 2**31])
def test_permutation_matches_mersenne_twister(seed):
    assert splits.permutation(1500, seed).tolist() == reference(1500, seed)


@pytest.mark.parity
@pytest.mark.parametrize("size", [1, 2, 56, 408, 3_270, 104_743, 363_846])
def test_permutation_matches_torch(size):
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(splits.SEED)
    expected = torch.randperm(size, generator=generator).numpy()
    assert np.array_equal(splits.permutation(size), expected)


@pytest.mark.parametrize(
    ("parts", "size", "expected"),
    [
        (splits.own(), 11, {}),
        (splits.halved(), 11, {"validation": (0, 5), "test": (5, 11)}),
        (splits.carved(), 67_349, {"validation": (0, 1000), "train": (1000, 67_349)}),
        (
            splits.carved(most=100_000),
            560_000,
            {"validation": (0, 1000), "train": (1000, 101_000)},
        ),
    ],
)
def test_part_places_by_rule_and_size(parts, size, expected):
    found = {name: part.places(size) for name, part in parts.items()}
    assert set(found) == {"train", "validation", "test"}
    bounds = {name: place.indices(size)[:2] for name, place in found.items() if place}
    assert bounds == expected


# --- Sources on disk -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds")
    tfds_data.write(path, CB)
    return path


def source(data=CB, parts=None, sizes=None, keys=("idx",), **rest):
    sizes = sizes or {"train": 9, "validation": 56}
    return PartsSource(data, parts or splits.halved(), sizes, keys, **rest)


def places(found: PartsSource, split: str) -> list[int]:
    """Returns the original positions of a split's rows."""
    texts = [row["premise"].decode() for row in found.get_dataset(split).as_numpy_iterator()]
    return [int(text.removeprefix("premise ")) for text in texts]


def test_parts_source_halved_uses_original_order(data_dir):
    validation, test = places(source(), "validation"), places(source(), "test")
    expected = reference(56, 42)
    assert set(validation) == set(expected[:28]) >= {22, 8, 36, 39, 34, 28}
    assert set(test) == set(expected[28:])
    assert len(validation) == len(test) == 28


def test_parts_source_without_keys_uses_tfds_order(data_dir):
    stored = tfds_data.stored_order(CB, "validation")
    expected = {stored[place] for place in reference(56, 42)[:28]}
    assert set(places(source(keys=()), "validation")) == expected


def test_parts_source_whole_split_in_stored_order(data_dir):
    assert places(source(), "train") == tfds_data.stored_order(CB, "train")


def test_parts_source_ignores_shuffle(data_dir):
    found = source()
    again = [row["idx"] for row in found.get_dataset("test", True, 7).as_numpy_iterator()]
    assert again == [row["idx"] for row in found.get_dataset("test").as_numpy_iterator()]


def test_parts_source_reads_only_requested_features(data_dir):
    found = source(reads=["hypothesis", "label"])
    assert set(found.get_dataset("validation").element_spec) == {"hypothesis", "label"}


@pytest.mark.parametrize("key", ["pythonClassName", "type"])
def test_parts_source_class_outside_tfds_is_not_imported(key, tmp_path, monkeypatch):
    tfds_data.write(tmp_path, CB)
    path = tmp_path / "super_glue" / "cb" / "1.0.2" / "features.json"
    if key == "type":
        features = {"type": "chosen_module.Text", "content": {}}
    else:
        features = json.loads(path.read_text())
        features["featuresDict"]["features"]["premise"][key] = "chosen_module.Text"
    path.write_text(json.dumps(features))
    (tmp_path / "chosen_module.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(seqio.utils, "_TFDS_DATA_DIR_OVERRIDE", str(tmp_path))
    with pytest.raises(ValueError, match=r"features.json refers to the class 'chosen_module.Text'"):
        source().get_dataset("train")


def test_parts_source_other_size_logs_warning(data_dir, caplog):
    source(sizes={"train": 9, "validation": 57}).get_dataset("test")
    warned = lambda: [r.getMessage() for r in caplog.records if "published" in r.getMessage()]  # noqa: E731
    (message,) = warned()
    assert "56 rows" in message and "57 in the published" in message and CB in message
    caplog.clear()
    source().get_dataset("test")
    assert not warned()


def test_parts_source_ambiguous_keys_raise(data_dir):
    with pytest.raises(ValueError, match="several rows have the same label"):
        source(keys=["label"]).get_dataset("validation")


def test_parts_source_unknown_split_raises(data_dir):
    found = source(parts={"validation": Part("dev", 0, 1)}, sizes={"dev": 1})
    with pytest.raises(ValueError, match=r"no 'dev' split on this machine, only .*validation"):
        found.get_dataset("validation")


@pytest.mark.parametrize("data", ["super_glue/boolq:1.0.2", "super_glue/cb:9.9.9", "no_such:1.0.0"])
def test_parts_source_absent_data_error_shows_command(data_dir, data):
    with pytest.raises(FileNotFoundError) as error:
        source(data=data).get_dataset("train")
    name, version = data.split(":")
    for part in (name, version, f"tfds build {data} --data_dir", str(data_dir), "--tfds_data_dir"):
        assert part in str(error.value)
    assert ("found version 1.0.2" in str(error.value)) == (data == "super_glue/cb:9.9.9")


def test_parts_source_positions_of_original_rows(data_dir):
    for parts, split, expected in [
        (splits.own(), "train", range(9)),
        (splits.halved(), "validation", reference(56, 42)[:28]),
        (splits.halved(), "test", reference(56, 42)[28:]),
    ]:
        found = source(parts=parts)
        assert np.array(places(found, split))[found.positions(split)].tolist() == list(expected)
        assert found.num_rows(split) == len(expected)


def test_parts_source_published_and_local_sizes(data_dir):
    found = source(sizes={"train": 250, "validation": 57})
    assert [found.num_input_examples(s) for s in ("train", "validation", "test")] == [250, 28, 29]
    assert [found.num_rows(s) for s in ("train", "validation", "test")] == [9, 28, 28]


def test_parts_source_is_prepared(data_dir, tmp_path):
    assert source().is_prepared()
    assert not source(data="super_glue/cb:9.9.9").is_prepared()
    seqio.set_tfds_data_dir_override(str(tmp_path))
    assert not source().is_prepared()
