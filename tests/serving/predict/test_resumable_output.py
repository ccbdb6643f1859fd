"""Answers in files: whole or resumable, never mixed."""

from __future__ import annotations

import json
import math
import os

import pytest

from mpt_jax.runtime.resumable_output import Refused, ResumableFile
from mpt_jax.serving.predict.resumable_output import File, Stream

LINES = [b"a\n", b"b\n", b"c\n", b"d\n", b"e"]
ANSWERS = [{"line": i + 1, "prediction": chr(97 + i)} for i in range(5)]
WHOLE = "".join(json.dumps(answer) + "\n" for answer in ANSWERS)
MADE_FROM = {"mode": "predict", "sizes": (1, 2)}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write(path, first, last, lines=LINES, made_from=MADE_FROM, finish=False):
    """Answers requests from the file's current position; returns that position."""
    output = File(path, made_from)
    done = output.begin(iter(lines))
    if done is None:
        return None
    assert done == first
    for i in range(done, last):
        output.write(lines[i : i + 1], ANSWERS[i : i + 1])
    if finish:
        output.finish()
    else:
        output.close()
    return done


def test_file_gets_final_name_when_complete(tmp_path):
    path = tmp_path / "deep" / "out.jsonl"
    write(path, 0, 2)
    assert names(path.parent) == ["out.jsonl.partial", "out.jsonl.partial_of"]
    write(path, 2, 5, finish=True)
    assert names(path.parent) == ["out.jsonl", "out.jsonl.COMPLETED"]
    assert path.read_text() == WHOLE
    assert write(path, 0, 5) is None, "it is complete"
    assert path.read_text() == WHOLE


@pytest.mark.parametrize("tail", ["", "{", '{"line": 3}\n', '{"line": 3}\n{"li'])
def test_file_answers_after_last_record_are_rewritten(tail, tmp_path):
    path = tmp_path / "out.jsonl"
    write(path, 0, 2)
    with (tmp_path / "out.jsonl.partial").open("a") as file:
        file.write(tail)
    write(path, 2, 5, finish=True)
    assert path.read_text() == WHOLE


def test_file_killed_before_rename_is_finished(tmp_path):
    path = tmp_path / "out.jsonl"
    write(path, 0, 5, finish=True)
    path.rename(tmp_path / "out.jsonl.partial")
    assert write(path, 0, 5) is None
    assert path.read_text() == WHOLE


@pytest.mark.parametrize("finish", [False, True])
def test_file_other_requests_or_settings_fail(finish, tmp_path):
    path, last = tmp_path / "out.jsonl", 5 if finish else 3
    write(path, 0, last, finish=finish)
    with pytest.raises(ValueError, match="mode: saved 'predict', current 'score'"):
        write(path, last, 5, made_from={**MADE_FROM, "mode": "score"})
    for others in ([b"a\n", b"x\n", *LINES[2:]], LINES[:2]):
        with pytest.raises(ValueError, match=f"first {last} lines .* differ"):
            write(path, last, 5, lines=others)


def test_complete_file_more_requests_fail(tmp_path):
    path = tmp_path / "out.jsonl"
    write(path, 0, 5, finish=True)
    with pytest.raises(ValueError, match="complete with 5 requests, but the input now has more"):
        write(path, 0, 5, lines=[*LINES, b"f"])


def test_file_foreign_or_damaged_fails(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("precious")
    with pytest.raises(ValueError, match="not written by this command"):
        write(path, 0, 5)
    assert path.read_text() == "precious"
    other = tmp_path / "other.jsonl"
    write(other, 0, 3)
    partial = tmp_path / "other.jsonl.partial"
    partial.write_text(partial.read_text()[:-5])
    with pytest.raises(ValueError, match="part of it is missing"):
        write(other, 3, 5)
    (tmp_path / "other.jsonl.partial_of").write_text("{")
    with pytest.raises(ValueError, match="partial_of cannot be read"):
        write(other, 3, 5)


# --- Lost files, and files of another run --------------------------------------------------------


def test_file_second_run_fails_first_continues(tmp_path):
    path = tmp_path / "out.jsonl"
    write(path, 0, 2)
    first, second = File(path, MADE_FROM), File(path, MADE_FROM)
    assert first.begin(iter(LINES)) == 2
    first.write(LINES[2:3], ANSWERS[2:3])
    with pytest.raises(Refused, match="Another process is writing .*partial. Wait for it"):
        second.begin(iter(LINES))
    first.write(LINES[3:], ANSWERS[3:])
    first.finish()
    assert path.read_text() == WHOLE
    assert second.begin(iter(LINES)) is None, "the lock is free, and the file is complete"
    assert path.read_text() == WHOLE


def test_file_finished_during_begin_is_kept(tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"
    first, second = File(path, MADE_FROM), File(path, MADE_FROM)
    first.begin(iter(LINES))
    first.write(LINES, ANSWERS)
    take = ResumableFile._take

    def taken(self):
        first.finish()
        take(self)

    monkeypatch.setattr(ResumableFile, "_take", taken)
    assert second.begin(iter(LINES)) is None
    assert path.read_text() == WHOLE
    assert json.loads((tmp_path / "out.jsonl.COMPLETED").read_text())["lines"] == 5


@pytest.mark.parametrize("change", ["gone", "shorter", "longer"])
def test_complete_file_changed_size_fails(change, tmp_path):
    path = tmp_path / "out.jsonl"
    write(path, 0, 5, finish=True)
    if change == "gone":
        path.unlink()
    else:
        path.write_text(WHOLE[:-1] if change == "shorter" else WHOLE + "x")
    found = "is missing" if change == "gone" else f"has {path.stat().st_size} bytes"
    with pytest.raises(Refused, match=f"{found}.*COMPLETED records {len(WHOLE)} bytes.*remove"):
        write(path, 0, 5)
    assert path.exists() == (change != "gone")


def test_file_answers_without_record_are_kept(tmp_path):
    path = tmp_path / "out.jsonl"
    write(path, 0, 3)
    (tmp_path / "out.jsonl.partial_of").unlink()
    partial = tmp_path / "out.jsonl.partial"
    kept = partial.read_bytes()
    assert kept
    with pytest.raises(Refused, match=f"out.jsonl.partial_of is missing, .* {len(kept)} bytes"):
        write(path, 0, 5)
    assert partial.read_bytes() == kept
    partial.write_bytes(b"")  # left by a start that was killed before its first answer
    write(path, 0, 5, finish=True)
    assert path.read_text() == WHOLE


def test_file_record_is_synced_before_rename(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def recorded(descriptor):
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append("record" if name.startswith(".out.jsonl.partial_of.") else name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    write(tmp_path / "out.jsonl", 0, 1)
    assert synced == ["record", "out.jsonl.partial", "record"]


def test_file_counts_failed_requests_of_earlier_starts(tmp_path):
    path = tmp_path / "out.jsonl"
    output = File(path, MADE_FROM)
    output.begin(iter(LINES))
    output.write(LINES[:2], [{"line": 1, "error": "no"}, ANSWERS[1]])
    output.close()
    again = File(path, MADE_FROM)
    again.begin(iter(LINES))
    assert (again.lines, again.failed) == (2, 1)
    again.write(LINES[2:], [*ANSWERS[2:4], {"line": 5, "error": "no"}])
    again.finish()
    whole = File(path, MADE_FROM)
    assert whole.begin(iter(LINES)) is None
    assert (whole.lines, whole.failed) == (5, 2)


def test_outputs_never_write_nan(tmp_path):
    path = tmp_path / "out.jsonl"
    with open(tmp_path / "stream", "wb") as stream:
        for output in (Stream(stream), File(path, MADE_FROM)):
            output.begin(iter(LINES))
            with pytest.raises(ValueError, match="not JSON compliant"):
                output.write(LINES[:1], [{"score": math.nan}])
            output.close()
    assert (tmp_path / "stream").read_bytes() == b"" and not path.exists()


def test_answers_are_utf8_lines(tmp_path):
    texts = ["Grüße, 東京 🙂", "half \ud83d", "line\u2028end\x85", "plain"]
    output = File(tmp_path / "out.jsonl", MADE_FROM)
    output.begin(iter(LINES[:4]))
    output.write(LINES[:4], [{"prediction": text} for text in texts])
    output.finish()
    lines = (tmp_path / "out.jsonl").read_bytes().decode().splitlines()
    assert [json.loads(line)["prediction"] for line in lines] == texts
    assert lines[0] == '{"prediction": "Grüße, 東京 🙂"}'
    assert lines[1] == '{"prediction": "half \\ud83d"}'
