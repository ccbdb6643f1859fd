"""Buckets that are not there, may not be read or do not answer, in TensorFlow's own errors."""

import time

import pytest
import tensorflow as tf
from etils.epath import backend

from mpt_jax import buckets
from tests import bucket


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


def test_a_bucket_that_is_there(tmp_path, monkeypatch):
    buckets.check([bucket.mount(tmp_path, monkeypatch)])


def test_who_may_see_objects_need_not_see_the_buckets_own_record(answering):
    answering(False, denied("403: storage.buckets.get"))
    buckets.check(["gs://b"])


def test_no_such_bucket(answering):
    answering(False, False)
    with pytest.raises(OSError, match="gs://b cannot be used: there is no such bucket") as error:
        buckets.check(["gs://b"])
    assert "gcloud storage buckets create gs://b" in str(error.value)


@pytest.mark.parametrize(
    "raised",
    [
        denied("401: Anonymous caller does not have storage.objects.get access.\n when reading"),
        tf.errors.FailedPreconditionError(None, None, "Could not resolve hostname"),
    ],
)
def test_what_a_library_says_is_passed_on_with_what_to_do(answering, raised):
    answering(raised)
    with pytest.raises(OSError) as error:
        buckets.check(["gs://b"])
    said = str(error.value)
    assert f"{type(raised).__name__}: {raised.message.splitlines()[0].rstrip('.')}. Log in" in said
    assert "gcloud auth application-default login" in said
    assert "when reading" not in said


def test_a_network_that_does_not_answer_is_not_waited_for(monkeypatch):
    class Silent:
        def exists(self, path):
            time.sleep(5)

    monkeypatch.setattr(backend, "tf_backend", Silent())
    started = time.monotonic()
    with pytest.raises(OSError, match="gs://b cannot be used: no answer within 0.2 s"):
        buckets.check(["gs://b"], seconds=0.2)
    assert time.monotonic() - started < 4


def test_every_bucket_is_asked_for_once(answering):
    found = buckets.named("""A = 'gs://b-1/x'\nB = ["gs://b.2", 'gs://b-1/y', 'x/gs']""")
    assert found == ["gs://b-1", "gs://b.2"]
    asked = answering(True).asked
    buckets.check(found)
    assert asked == ["gs://b-1/mpt_jax_probe", "gs://b.2/mpt_jax_probe"]
