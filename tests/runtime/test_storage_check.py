"""Buckets that do not exist, cannot be read or do not answer, with TensorFlow's errors."""

import json
import time

import numpy as np
import pytest
import tensorflow as tf
from etils import epath
from etils.epath import backend

from mpt_jax.artifacts import artifacts
from mpt_jax.core.runs import Runs
from mpt_jax.evaluation import metric_writers
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.runtime import storage_check
from mpt_jax.tasks import file_readers
from tests.fixtures import fake_gcs, saved_artifacts


class Refusing:
    """Answers `exists` for objects and for the bucket itself, or raises."""

    def __init__(self, of_object, of_bucket=True):
        self.answers, self.asked = {True: of_object, False: of_bucket}, []

    def exists(self, path):
        self.asked.append(str(path))
        answer = self.answers[str(path).count("/") > 2]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def answering(monkeypatch):
    def set_up(*answers) -> Refusing:
        made = Refusing(*answers)
        monkeypatch.setattr(backend, "tf_backend", made)
        return made

    return set_up


def denied(text: str) -> Exception:
    return tf.errors.PermissionDeniedError(None, None, text)


def test_storage_check_existing_bucket_passes(tmp_path, monkeypatch):
    storage_check.check([fake_gcs.mount(tmp_path, monkeypatch)])


def test_storage_check_access_to_objects_only_passes(answering):
    answering(False, denied("403: storage.buckets.get"))
    storage_check.check(["gs://b"])


def test_storage_check_missing_bucket_error(answering):
    answering(False, False)
    with pytest.raises(OSError, match="gs://b cannot be used: it does not exist") as error:
        storage_check.check(["gs://b"])
    assert "gcloud storage buckets create gs://b" in str(error.value)


@pytest.mark.parametrize(
    "raised",
    [
        denied("401: Anonymous caller does not have storage.objects.get access.\n when reading"),
        tf.errors.FailedPreconditionError(None, None, "Could not resolve hostname"),
    ],
)
def test_storage_check_library_error_shown_with_advice(answering, raised):
    answering(raised)
    with pytest.raises(OSError) as error:
        storage_check.check(["gs://b"])
    said = str(error.value)
    assert f"{type(raised).__name__}: {raised.message.splitlines()[0].rstrip('.')}. Log in" in said
    assert "gcloud auth application-default login" in said
    assert "when reading" not in said


def test_storage_check_no_answer_times_out(monkeypatch):
    class Silent:
        def exists(self, path):
            time.sleep(5)

    monkeypatch.setattr(backend, "tf_backend", Silent())
    started = time.monotonic()
    with pytest.raises(OSError, match="gs://b cannot be used: no answer within 0.2 s"):
        storage_check.check(["gs://b"], seconds=0.2)
    assert time.monotonic() - started < 4


def test_storage_check_repeated_bucket_queried_once(answering):
    found = storage_check.named("""A = 'gs://b-1/x'\nB = ["gs://b.2", 'gs://b-1/y', 'x/gs']""")
    assert found == ["gs://b-1", "gs://b.2"]
    asked = answering(True).asked
    storage_check.check(found)
    assert asked == ["gs://b-1/mpt_jax_probe", "gs://b.2/mpt_jax_probe"]


def test_artifact_in_bucket_saved_and_loaded(tmp_path, monkeypatch):
    folder = f"{fake_gcs.mount(tmp_path, monkeypatch)}/stage/artifact"
    params = {"table": np.arange(12, dtype=np.float32).reshape(1, 3, 4)}
    for _ in range(2):  # the second replaces the first
        artifacts.save_artifact(
            folder, PromptTuning(3), params, Runs(["rte"]),
            digests=saved_artifacts.DIGESTS, backbone="t5", step=1,
        )  # fmt: skip
    read = artifacts.load_artifact(folder)
    np.testing.assert_array_equal(read.params["table"], params["table"])
    assert (tmp_path / "stage" / "artifact" / "prompts.safetensors").exists()
    assert [path.name for path in (tmp_path / "stage").iterdir()] == ["artifact"]


def test_file_readers_file_in_bucket_read(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"q": "one", "a": "two"}\n')
    file = epath.Path(fake_gcs.mount(tmp_path, monkeypatch), "rows.jsonl")
    templates = file_readers.Template("inputs", "{q}"), file_readers.Template("targets", "{a}")
    found = file_readers.read(file, *templates, {})
    assert (list(found.inputs), list(found.targets)) == (["one"], ["two"])


def test_run_record_in_bucket_written(tmp_path, monkeypatch):
    model_dir = f"{fake_gcs.mount(tmp_path, monkeypatch)}/stage"
    epath.Path(model_dir).mkdir()
    metric_writers.write_run_record(model_dir, {"seed": 1})
    (line,) = (tmp_path / "stage" / "run.jsonl").read_text().splitlines()
    assert json.loads(line)["seed"] == 1
