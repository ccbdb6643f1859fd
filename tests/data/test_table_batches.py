"""Training batches of text tasks: recorded batches and positions, hosts, and what is refused."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.fixtures import golden_batches
from tests.fixtures.golden_batches import digest, iterator

RECORDED = Path(__file__).parents[1] / "golden" / "batches"
EXPECTED = json.loads((RECORDED / "batches.json").read_text())
KINDS = tuple(golden_batches.KINDS)
AFTER = 137


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_batches_equal_those_recorded_before_hosts_made_only_their_rows(name):
    batches, together = iterator(*name.split("/")), hashlib.sha256()
    for number in range(1000):
        found = digest(next(batches))
        assert found == EXPECTED[name].get(str(number), found)
        together.update(found.encode())
    assert together.hexdigest() == EXPECTED[name]["1000 batches"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "buckets"])
@pytest.mark.parametrize("hosts", [1, 4])
def test_position_that_tf_data_saved_continues_exactly(kind, hosts):
    saved = (RECORDED / f"{kind}_after_{AFTER}").read_bytes()
    parts = [iterator("stochastic", kind, num_hosts=hosts, host_index=i) for i in range(hosts)]
    for part in parts:
        part.restore(saved)
    for number in (AFTER, AFTER + 1):
        assert (
            digest(joined([next(part) for part in parts]))
            == (EXPECTED[f"stochastic/{kind}"][str(number)])
        )


def joined(parts):
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("kind", KINDS)
def test_hosts_share_the_batch_of_one_and_resume_in_other_numbers(kind):
    whole = [digest(next(batches)) for batches in [iterator("stochastic", kind)] for _ in range(60)]
    number, saved = 0, None
    for hosts in (1, 2, 8, 4, 1):
        parts = [iterator("stochastic", kind, num_hosts=hosts, host_index=i) for i in range(hosts)]
        for part in parts:
            if saved is not None:
                part.restore(saved)
        for _ in range(11):
            assert digest(joined([next(part) for part in parts])) == whole[number]
            number += 1
        states = {part.state() for part in parts}
        assert len(states) == 1, "the position is the same on all hosts"
        (saved,) = states


def test_position_is_small_and_does_not_move_the_iterator():
    for kind in KINDS:
        batches = iterator("per_example", kind)
        for _ in range(5):
            next(batches)
        saved = batches.state()
        assert len(saved) < 1500
        following = [digest(next(batches)) for _ in range(3)]
        batches.restore(saved)
        assert [digest(next(batches)) for _ in range(3)] == following


@pytest.mark.parametrize(
    "change",
    [
        {"counts": [1]},
        {"counts": [2**62] * 6},
        {"taken": 48},
        {"taken": 7, "counts": [7, 0, 0, 0, 0, 0]},
        {"rows": 10**15},
        {"rows": -1},
        {"counts": None},
    ],
)
def test_damaged_place_raises(change):
    check_refused(change)


def test_position_without_a_place_raises():
    check_refused(None)


def check_refused(change):
    batches = iterator("stochastic", "packed")
    next(batches)
    files = zipfile.ZipFile(io.BytesIO(batches.state()))
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("position.json", files.read("position.json"))
        if change is not None:
            place = json.loads(files.read("place.json")) | change
            archive.writestr("place.json", json.dumps(place))
    with pytest.raises(ValueError, match="data position is corrupt.*Rename the checkpoint"):
        batches.restore(content.getvalue())
