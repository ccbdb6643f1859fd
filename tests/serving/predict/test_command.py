"""`mpt-jax predict` as a command, with the shipped tiny T5."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from etils import epath

from mpt_jax.artifacts.backbone_digest import backbone_digest
from mpt_jax.batching import tokenizers
from mpt_jax.convert import backbones, load_backbone, save_hf, save_t5x
from mpt_jax.core.tree import flatten, unflatten
from mpt_jax.runtime import paths
from mpt_jax.serving.predict import __main__ as command
from mpt_jax.serving.predict import backbone
from mpt_jax.serving.prompt_bank import Bank, Named
from tests.fixtures import tiny

ROOT = Path(__file__).resolve().parents[3]
SOURCE = str(paths.SHIPPED / "tiny_t5" / "mpt_source")
SHIPPED = str(paths.SHIPPED / "tiny_t5" / "checkpoint_10000")
SIZES = ["--input-length", "16", "--target-length", "4", "--batch-size", "4"]
REQUESTS = [
    {"task": "toy_sst2", "inputs": "sst2 : a fine film"},
    {"task": "toy_sst3", "inputs": "sst2 : a fine film"},
    {"task": "toy_mnli", "id": "b", "inputs": "mnli : x", "choices": ["neutral", "entailment"]},
]


@pytest.fixture
def run(tmp_path, capfdbinary):
    """Runs the command in this process on some lines; returns exit code, answers and messages."""

    def call(*arguments, lines=REQUESTS, prompts=(SOURCE,)):
        path = tmp_path / "requests.jsonl"
        encoded = [x if isinstance(x, str) else json.dumps(x) for x in lines]
        path.write_text("".join(f"{line}\n" for line in encoded))
        with pytest.raises(SystemExit) as ended:
            command.main(["--prompts", *prompts, "--input", str(path), *SIZES, *arguments])
        out, err = capfdbinary.readouterr()
        answers = [json.loads(line) for line in out.decode().splitlines()]
        return ended.value.code, answers, err.decode()

    return call


def test_predict_command_answers_in_request_order(run):
    code, answers, said = run()
    assert code == 0
    assert [answer["line"] for answer in answers] == [1, 2, 3]
    assert answers[0]["prediction"] in ("positive", "negative")
    assert "Unknown task 'toy_sst3'" in answers[1]["error"]
    assert answers[2]["id"] == "b" and len(answers[2]["scores"]) == 2
    assert "6 tasks" in said and "3 answered, 1 of them errors" in said


def test_predict_command_exit_code_shows_failed_lines(run):
    assert run("--strict")[0] == 1
    assert run("--strict", lines=REQUESTS[:1])[0] == 0
    assert run(lines=["nope", ""])[0] == 1
    assert run(lines=[])[:2] == (0, [])


def test_predict_command_interrupted_output_resumes(run, tmp_path, monkeypatch):
    lines = [REQUESTS[0] | {"inputs": f"sst2 : film {i}"} for i in range(9)]
    _, whole, _ = run(lines=lines)
    monkeypatch.setattr(command, "WINDOW", 1)  # four lines at a time
    path = tmp_path / "answers.jsonl"
    answer = command.Server.answer
    windows = []

    def interrupted(server, requests):
        windows.append([request.label["line"] for request in requests])
        if len(windows) == 2:
            raise KeyboardInterrupt
        return answer(server, requests)

    monkeypatch.setattr(command.Server, "answer", interrupted)
    code, _, said = run("--output", str(path), lines=lines)
    assert code == 130 and "the same command resumes" in said and not path.exists()
    code, _, said = run("--output", str(path), lines=lines)
    assert code == 0 and "resuming after 4 answered lines" in said
    assert windows == [[1, 2, 3, 4], [5, 6, 7, 8], [5, 6, 7, 8], [9]]
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [x["line"] for x in found] == list(range(1, 10))
    for one, other in zip(found, whole, strict=True):
        assert one["prediction"] == other["prediction"]
        assert one["score"] == pytest.approx(other["score"], rel=1e-4)
    code, _, said = run("--output", str(path), lines=lines)
    assert code == 0 and "already complete" in said
    code, _, said = run("--output", str(path), "--truncate", lines=lines)
    assert code == 2 and "truncate: saved False, current True" in said


def test_predict_command_exit_code_counts_earlier_starts(run, tmp_path, monkeypatch):
    good = REQUESTS[0]
    monkeypatch.setattr(command, "WINDOW", 1)  # four lines at a time
    for name, lines, usual in (("first", ["nope", *[good] * 4], 0), ("all", ["nope"] * 5, 1)):
        answers, answer = ["--output", str(tmp_path / name)], command.Server.answer

        def interrupted(server, requests, answer=answer):
            if requests[0].label["line"] > 4:
                raise OSError(28, "No space left on device")
            return answer(server, requests)

        with monkeypatch.context() as patched:
            patched.setattr(command.Server, "answer", interrupted)
            code, _, said = run(*answers, lines=lines)
            assert code == 2 and "No space left" in said and not (tmp_path / name).exists()
        assert run(*answers, "--strict", lines=lines)[0] == 1, "the line of the first start failed"
        assert run(*answers, "--strict", lines=lines)[0] == 1, (
            "and counts when the file is complete"
        )
        assert run(*answers, lines=lines)[0] == usual


def test_predict_command_invalid_arguments_exit_with_2(run, tmp_path):
    code, answers, said = run(prompts=(SOURCE, SOURCE))
    assert (code, answers) == (2, []) and "'toy_sst2'" in said and "NAME=" in said
    code, _, said = run(prompts=(str(tmp_path / "none"),))
    assert code == 2 and "No prompt artifact at" in said
    code, _, said = run("--batch-size", "0")
    assert code == 2 and "batch_size is 0" in said


# --- Backbone and vocabulary ---------------------------------------------------------------------


def test_backbone_load_other_backbone_or_vocabulary_fails(tmp_path):
    bank = Bank.load([Named(SOURCE)])
    found = backbone.load(bank)
    assert found.embedding_sha256 == bank.config["embedding_sha256"]
    assert found.vocabulary_sha256 == bank.config["vocabulary_sha256"]
    other = {k: v for k, v in tiny.params(tiny.model()).items() if k != "prompt"}
    wrong = save_t5x(tmp_path, other, 0)
    with pytest.raises(ValueError, match="trained on another backbone.*sha256"):
        backbone.load(bank, str(wrong))
    with pytest.raises(
        ValueError, match="trained with another vocabulary.*sentinels differs.*--extra-ids"
    ):
        backbone.load(bank, vocabulary=paths.shipped(name="toy.model"))  # of 100 sentinels
    with pytest.raises(FileNotFoundError, match="has no usable vocabulary beside it.*--vocabulary"):
        backbone.load(bank, SHIPPED)
    given = backbone.load(bank, SHIPPED, paths.shipped(name="toy.model"), extra_ids=16)
    assert given.vocabulary_sha256 == found.vocabulary_sha256


def test_backbone_load_vocabulary_beside_backbone_is_used(tmp_path):
    folder = save_t5x(tmp_path, load_backbone(SHIPPED), 0)
    model = tokenizers.load(paths.shipped(name="toy.model"), 16).sp_model
    (folder / "spiece.model").write_bytes(model)  # its sentinels are pieces, as umT5's are
    bank = Bank.load([Named(SOURCE)])
    found = backbone.load(bank, str(folder), extra_ids=0)
    assert found.vocabulary_sha256 == bank.config["vocabulary_sha256"]


def test_backbone_load_without_path_other_backbone_fails(tmp_path):
    shutil.copytree(SOURCE, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config |= {"embedding_sha256": "f" * 64, "backbone": "t5-base", "config_sha256": None}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="'t5-base'.*f{64}.*--backbone"):
        backbone.load(Bank.load([Named(str(tmp_path / "a"))]))


@pytest.fixture
def other_weights(tmp_path) -> str:
    """The shipped backbone with other attention weights, as after merging a LoRA."""
    leaves = flatten(load_backbone(SHIPPED))
    name = "encoder/layers_0/attention/query/kernel"
    return str(save_t5x(tmp_path, unflatten({**leaves, name: leaves[name] * 1.1}), 0))


def test_predict_command_other_weights_same_embedding_refused(run, other_weights):
    vocabulary = ["--vocabulary", paths.shipped(name="toy.model"), "--extra-ids", "16"]
    code, answers, said = run("--backbone", other_weights, *vocabulary)
    assert (code, answers) == (2, []) and "trained on another backbone" in said
    weights = backbone_digest(load_backbone(other_weights))
    recorded = json.loads((Path(SOURCE) / "config.json").read_text())["backbone_sha256"]
    assert weights in said and recorded in said and "--backbone" in said
    arguments = ["--backbone", other_weights, *vocabulary, "--no-backbone-digest"]
    code, answers, said = run(*arguments, lines=REQUESTS[:1])
    assert code == 0 and len(answers) == 1
    assert "Only the backbone's embedding was checked" in said


def test_predict_command_other_configuration_of_backbone_refused(run, tmp_path):
    """The same weights, with other positions. The recorded configuration is that of the shapes."""
    config, params = backbones.read(epath.Path(SHIPPED), None, lambda _: None)
    folder = save_hf(tmp_path / "t5", config, params)
    vocabulary = ["--vocabulary", paths.shipped(name="toy.model"), "--extra-ids", "16"]
    code, answers, said = run("--backbone", str(folder), *vocabulary, lines=REQUESTS[:1])
    assert code == 0 and len(answers) == 1 and "backbone_config" not in said
    fields = json.loads((folder / "config.json").read_text())
    fields["relative_attention_max_distance"] = 17
    (folder / "config.json").write_text(json.dumps(fields))
    code, answers, said = run("--backbone", str(folder), *vocabulary, lines=REQUESTS[:1])
    assert (code, answers) == (2, [])
    assert "(relative_attention_max_distance: saved 128, current 17)" in said
    assert "--config" in said


def test_predict_command_old_artifact_and_output_are_read_with_a_warning(run, tmp_path):
    """Neither an artifact nor a record of an earlier version has a digest of all weights."""
    shutil.copytree(SOURCE, tmp_path / "old")
    path = tmp_path / "old" / "config.json"
    config = json.loads(path.read_text())
    del config["backbone_sha256"], config["config_sha256"]
    path.write_text(json.dumps(config))
    output = ["--output", str(tmp_path / "out.jsonl")]
    code, _, said = run(*output, lines=REQUESTS[:1], prompts=[str(tmp_path / "old")])
    assert code == 0 and said.count(f"{tmp_path}/old records no backbone_sha256") == 1
    record = tmp_path / "out.jsonl.COMPLETED"
    fields = json.loads(record.read_text())
    assert fields["made_from"].pop("backbone_sha256") and fields.pop("record_sha256")
    record.write_text(json.dumps(fields))
    code, _, said = run(*output, lines=REQUESTS[:1], prompts=[str(tmp_path / "old")])
    assert code == 0 and "is already complete" in said
    fields["made_from"]["backbone_sha256"] = "0" * 64
    record.write_text(json.dumps(fields))
    code, _, said = run(*output, lines=REQUESTS[:1], prompts=[str(tmp_path / "old")])
    assert code == 2 and f"backbone_sha256: saved '{'0' * 64}'" in said


# --- As a process --------------------------------------------------------------------------------


def test_predict_command_streams_without_tensorflow():
    """Each line is answered before the next is sent, and standard input stays open."""
    blocked = "; ".join(
        f"sys.modules[{name!r}] = None" for name in ("tensorflow", "seqio", "gin", "torch", "t5")
    )
    script = f"import sys; {blocked}; from mpt_jax.serving.predict.__main__ import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", script, "--prompts", SOURCE, *SIZES],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    ) as child:
        assert child.stdin and child.stdout and child.stderr
        for number, request in enumerate(REQUESTS, start=1):
            child.stdin.write(json.dumps(request).encode() + b"\n")
            child.stdin.flush()
            line = child.stdout.readline()
            assert line, child.stderr.read().decode()[-2000:]
            assert json.loads(line)["line"] == number
        child.stdin.close()
        assert child.wait(30) == 0, child.stderr.read().decode()[-2000:]


def test_predict_command_closed_stdout_is_no_error():
    lines = "".join(json.dumps(REQUESTS[0]) + "\n" for _ in range(2))
    child = subprocess.run(
        f"{sys.executable} -m mpt_jax.serving.predict --prompts {SOURCE} {' '.join(SIZES)} "
        "| head -n 0",
        shell=True,
        input=lines.encode(),
        capture_output=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert b"Traceback" not in child.stderr, child.stderr.decode()[-2000:]


def shell(command_line: str, lines: list[str]) -> tuple[int, str]:
    """Runs a line in bash, with the command as $PREDICT; returns its exit code and messages."""
    predict = f"{sys.executable} -m mpt_jax.serving.predict --prompts {SOURCE} {' '.join(SIZES)}"
    child = subprocess.run(
        ["bash", "-c", command_line.replace("$PREDICT", predict)],
        input="".join(f"{line}\n" for line in lines).encode(),
        capture_output=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        check=False,
    )
    return child.returncode, child.stderr.decode()


def test_predict_command_closed_stderr_finishes_output(tmp_path):
    """Standard error is a pipe whose reader has exited."""
    lines = [json.dumps(REQUESTS[0])] * 3
    gone = f"($PREDICT --output {tmp_path}/out 2>&1 >/dev/null; echo $? >{tmp_path}/rc) | exec true"
    shell(gone, lines)
    assert (tmp_path / "rc").read_text() == "0\n"
    assert len((tmp_path / "out").read_text().splitlines()) == 3


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_predict_command_full_disk_exits_with_2():
    code, said = shell("$PREDICT > /dev/full", [json.dumps(REQUESTS[0])])
    assert code == 2
    assert said.splitlines()[-1].endswith("No space left on device"), said
