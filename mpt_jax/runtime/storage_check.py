"""Check, before a job starts, that each storage bucket can be used; at most a minute per bucket.

Paths like `gs://bucket/folder` are read and written through etils, Orbax and TensorStore. Without
a network these libraries retry for many minutes, and they report missing credentials in long
tracebacks. This check queries each bucket once and reports a problem in one line.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable

from etils import epath

SECONDS = 60.0
_BUCKET = re.compile(r"gs://[a-z0-9][a-z0-9._-]*")
_ADVICE = (
    "Log in with `gcloud auth application-default login`. On a TPU VM or in GKE, give the "
    "machine's service account the role Storage Object Admin on the bucket. "
    "`gcloud storage ls {bucket}` shows whether you have access."
)


def named(text: str) -> list[str]:
    """Returns the buckets (`gs://bucket`) that a text mentions, without duplicates."""
    return sorted(set(_BUCKET.findall(text)))


def check(buckets: Iterable[str], seconds: float = SECONDS) -> None:
    """Checks that buckets exist and can be read.

    Args:
        buckets: names like `gs://bucket`.
        seconds: how long to wait for each bucket.

    Raises:
        OSError: a bucket does not exist, cannot be read, or does not answer.
    """
    for bucket in buckets:
        answers: list[str | None] = []
        # A daemon thread, because TensorFlow's retries cannot be stopped.
        query = threading.Thread(
            target=lambda bucket, answers: answers.append(_problem(bucket)),
            args=(bucket, answers),
            daemon=True,
        )
        query.start()
        query.join(seconds)
        problem = answers[0] if answers else f"no answer within {seconds:g} s"
        if problem is not None:
            raise OSError(f"{bucket} cannot be used: {problem}. {_ADVICE.format(bucket=bucket)}")


def _problem(bucket: str) -> str | None:
    """Returns a description of what is wrong with a bucket, or None if it can be used."""
    try:
        if epath.Path(bucket, "mpt_jax_probe").exists():  # most roles may query an object
            return None
    except Exception as error:  # noqa: BLE001 - TensorFlow and gcsfs share no error type
        return _first_line(error)
    try:
        if epath.Path(bucket).exists():
            return None
    except Exception:  # noqa: BLE001 - some roles may query objects but not the bucket
        return None
    return f"it does not exist; create it with `gcloud storage buckets create {bucket}`"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
