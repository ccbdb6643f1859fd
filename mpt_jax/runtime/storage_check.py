"""Whether buckets can be used is found out before a run begins, and within a minute for each.

Paths like `gs://bucket/folder` are read and written through etils, Orbax and TensorStore. Left to
themselves these try again for many minutes where there is no network, and report missing
credentials from deep inside; so each bucket is asked for once, here.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable

from etils import epath

SECONDS = 60.0
_BUCKET = re.compile(r"gs://[a-z0-9][a-z0-9._-]*")
_MEND = (
    "Log in with `gcloud auth application-default login`; on a TPU VM or in GKE give the machine's "
    "service account the role Storage Object Admin on the bucket; "
    "`gcloud storage ls {bucket}` shows whether it can be seen."
)


def named(text: str) -> list[str]:
    """The buckets a text mentions, `gs://bucket`, each once."""
    return sorted(set(_BUCKET.findall(text)))


def check(buckets: Iterable[str], seconds: float = SECONDS) -> None:
    """Asks whether buckets are there.

    Args:
        buckets: `gs://bucket`, each.
        seconds: how long to wait for an answer.

    Raises:
        OSError: one is not there, may not be read, or does not answer.
    """
    for bucket in buckets:
        answers: list[str | None] = []
        # A daemon, because TensorFlow's own attempts cannot be ended.
        asking = threading.Thread(
            target=lambda bucket, said: said.append(_problem(bucket)),
            args=(bucket, answers),
            daemon=True,
        )
        asking.start()
        asking.join(seconds)
        problem = answers[0] if answers else f"no answer within {seconds:g} s"
        if problem is not None:
            raise OSError(f"{bucket} cannot be used: {problem}. {_MEND.format(bucket=bucket)}")


def _problem(bucket: str) -> str | None:
    """What is wrong with a bucket, if anything."""
    try:
        if epath.Path(bucket, "mpt_jax_probe").exists():  # an object, which most roles may ask for
            return None
    except Exception as error:  # noqa: BLE001 - TensorFlow's and gcsfs's have no common type
        return _first_line(error)
    try:
        if epath.Path(bucket).exists():
            return None
    except Exception:  # noqa: BLE001 - objects may be seen, the bucket's own record need not be
        return None
    return f"there is no such bucket; `gcloud storage buckets create {bucket}` makes it"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
