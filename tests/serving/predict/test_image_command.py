"""`mpt-jax predict` on images as a command."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpt_jax.runtime import paths
from mpt_jax.serving.predict import __main__ as command
from mpt_jax.serving.predict.image_server import ImageServer
from tests.fixtures import image_serving
from tests.fixtures.image_files import encoded, noise

ROOT = Path(__file__).resolve().parents[3]
TEXT_ARTIFACT = str(paths.SHIPPED / "tiny_t5" / "mpt_source")
TASKS = ("pets", "shapes", "tags")


@pytest.fixture(scope="module")
def saved(clip, tmp_path_factory):
    return image_serving.save(tmp_path_factory.mktemp("artifact") / "a", clip)


@pytest.fixture
def requests(tmp_path):
    """Nine requests about files."""
    found = []
    for number in range(9):
        path = tmp_path / f"{number}.png"
        path.write_bytes(encoded(noise(16, 16, number), "PNG"))
        found.append({"task": TASKS[number % 3], "image": str(path), "id": number})
    return found


@pytest.fixture
def run(saved, clip, tmp_path, capfdbinary):
    """Runs the command in this process on some lines; returns exit code, answers and messages."""

    def call(*arguments, lines=(), prompts=None, backbone=clip):
        path = tmp_path / "requests.jsonl"
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        given = ["--prompts", *(prompts or [saved.folder]), "--input", str(path)]
        given += ["--batch-size", "2", *(["--backbone", str(backbone)] if backbone else [])]
        with pytest.raises(SystemExit) as ended:
            command.main([*given, *arguments])
        out, err = capfdbinary.readouterr()
        answers = [json.loads(line) for line in out.decode().splitlines()]
        return ended.value.code, answers, err.decode()

    return call


@pytest.mark.parametrize(
    ("arguments", "flags"),
    [
        (["--folded", "--vocabulary", "byt5"], "--folded, --vocabulary"),
        (["--input-length", "64", "--truncate"], "--truncate, --input-length"),
        (["--config", "t5_1_1_base", "--extra-ids", "0"], "--extra-ids, --config"),
    ],
)
def test_arguments_of_texts_are_refused(arguments, flags, run, saved):
    code, answers, err = run(*arguments)
    assert (code, answers) == (2, [])
    why = f"{flags} would have no effect, because the prompts {saved.folder} are of an image job."
    assert f"{why} Omit it." in err


def test_predict_command_answers_about_images(run, saved, requests):
    lines = [*requests, {"task": "pest", "image": "x"}]
    code, answers, said = run("--mode", "score", lines=lines)
    assert code == 0 and "3 tasks, 0.00 MiB of prompts" in said
    assert "10 answered, 1 of them errors" in said
    assert [answer["line"] for answer in answers] == list(range(1, 11))
    for number, answer in enumerate(answers[:9]):
        assert answer["id"] == number
        expected = saved.scores(TASKS[number % 3], noise(16, 16, number))
        assert answer["scores"] == pytest.approx(expected, abs=1e-5)
    assert "Unknown task 'pest'" in answers[9]["error"]
    assert run("--strict", lines=lines)[0] == 1
    assert run("--strict", lines=requests)[0] == 0
    assert run(lines=lines[9:])[0] == 1


def test_predict_command_interrupted_output_of_images_resumes(
    run, saved, clip, requests, tmp_path, monkeypatch
):
    """The bytes are those of an uninterrupted run; another set of prompts or mode is refused."""
    monkeypatch.setattr(command, "WINDOW", 1)  # two lines at a time
    whole, path = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    assert run("--output", str(whole), lines=requests)[0] == 0
    answer, windows = ImageServer.answer, []

    def interrupted(server, given):
        windows.append([request.label["line"] for request in given])
        if len(windows) == 3:
            raise KeyboardInterrupt
        return answer(server, given)

    monkeypatch.setattr(ImageServer, "answer", interrupted)
    output = ["--output", str(path)]
    code, _, said = run(*output, lines=requests)
    assert code == 130 and "the same command resumes" in said and not path.exists()
    other = image_serving.save(tmp_path / "other", clip, seed=1)
    code, _, said = run(*output, lines=requests, prompts=[other.folder])
    assert code == 2 and "prompts_sha256: saved" in said
    code, _, said = run(*output, lines=requests, prompts=[f"new={saved.folder}"])
    assert code == 2 and "prompts_sha256: saved" in said
    code, _, said = run(*output, "--mode", "score", lines=requests)
    assert code == 2 and "mode: saved 'predict', current 'score'" in said
    code, _, said = run(*output, lines=requests)
    assert code == 0 and "resuming after 4 answered lines" in said
    assert windows == [[1, 2], [3, 4], [5, 6], [5, 6], [7, 8], [9]]
    assert path.read_bytes() == whole.read_bytes()
    code, _, said = run(*output, lines=requests)
    assert code == 0 and "already complete" in said
    code, _, said = run(*output, lines=requests[1:])
    assert code == 2 and "answers to other requests" in said


def test_predict_command_images_invalid_arguments_exit_with_2(run, saved, tmp_path):
    for arguments, message in (
        ({"backbone": None}, "Set --backbone to its Hugging Face or open_clip folder"),
        ({"backbone": tmp_path}, "has no config.json and no open_clip_config.json"),
        ({"prompts": [saved.folder, saved.folder]}, "NEW_NAME="),
        ({"prompts": [saved.folder, str(tmp_path / "none")]}, "No prompt artifact at"),
        ({"prompts": [saved.folder, TEXT_ARTIFACT]}, "cannot be combined, since their backbone"),
        ({"prompts": [TEXT_ARTIFACT, saved.folder]}, "cannot be combined, since their backbone"),
    ):
        code, answers, said = run(**arguments)
        assert (code, answers) == (2, []) and message in said, said
    code, _, said = run("--batch-size", "0")
    assert code == 2 and "batch_size is 0. Set --batch-size to at least 1." in said


@pytest.mark.slow
def test_predict_command_killed_with_images_resumes_without_tensorflow(
    saved, clip, requests, tmp_path
):
    """A process that ends without cleaning up after four answers, and another that finishes."""
    path, given = tmp_path / "answers.jsonl", tmp_path / "requests.jsonl"
    given.write_text("".join(f"{json.dumps(request)}\n" for request in requests))
    blocked = "; ".join(
        f"sys.modules[{name!r}] = None" for name in ("tensorflow", "seqio", "gin", "torch", "t5")
    )
    start = f"import os, sys; {blocked}; from mpt_jax.serving.predict import __main__ as c; "
    start += "c.WINDOW = 1; "
    killed = (
        "f = c.ImageServer.answer; c.ImageServer.answer = lambda s, r: "
        "os.kill(os.getpid(), 9) if r[0].label['line'] > 4 else f(s, r); "
    )
    options = ["--prompts", saved.folder, "--backbone", str(clip), "--batch-size", "2"]

    def start_command(extra, output):
        return subprocess.run(
            [sys.executable, "-c", f"{start}{extra}c.main()", *options, "--input", str(given)]
            + ["--output", str(output)],
            capture_output=True,
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            check=False,
        )

    assert start_command(killed, path).returncode == -9 and not path.exists()
    child = start_command("", path)
    assert child.returncode == 0, child.stderr.decode()[-2000:]
    assert b"resuming after 4 answered lines" in child.stderr
    assert start_command("", tmp_path / "whole.jsonl").returncode == 0
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_predict_command_reads_base64_from_standard_input(saved, clip, monkeypatch, capfdbinary):
    content = base64.b64encode(encoded(noise(16, 16), "PNG")).decode()
    line = json.dumps({"task": "pets", "image_base64": content}).encode() + b"\n"
    read, write = os.pipe()
    os.write(write, line)
    os.close(write)
    monkeypatch.setattr(command, "_opened", lambda path: os.fdopen(read, "rb"))
    with pytest.raises(SystemExit) as ended:
        command.main(["--prompts", saved.folder, "--backbone", str(clip)])
    (answer,) = map(json.loads, capfdbinary.readouterr().out.decode().splitlines())
    assert ended.value.code == 0
    scores = saved.scores("pets", noise(16, 16))
    assert answer["prediction"] == max(scores, key=lambda name: scores[name])
