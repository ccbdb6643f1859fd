"""Server that answers requests for any task of a bank, batched by length but answered in order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mpt_jax.batching.bucketing import smallest
from mpt_jax.runtime import malloc
from mpt_jax.serving.predict import backbone as backbones
from mpt_jax.serving.predict.compiled import Functions
from mpt_jax.serving.predict.requests import Failure, Reader, Request
from mpt_jax.serving.prompt_bank import Bank, Named

Answer = dict[str, Any]
# Programs are compiled for these numbers of tokens, doubled up to the limit.
SHORTEST_INPUT, SHORTEST_TARGET = 16, 8
# The numbers of rows grow by this factor up to the batch size: one request does not wait for the
# work of a whole batch, and few programs are compiled.
FEWER_ROWS = 4
NOT_FINITE = (
    "The score is NaN or infinite ({}), so the answer is meaningless. Check the weights of the "
    "backbone and of the prompt for NaN and infinite values."
)


class _Job(NamedTuple):
    """An example of a batch: indices of its request and target, its tokens, and its bank row."""

    request: int
    target: int
    inputs: list[int]
    targets: list[int]
    row: int


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of requests and batches, which also determine how many programs are compiled.

    Attributes:
        input_length: the maximum number of tokens of an input, including the end of sequence.
        target_length: the maximum number of tokens to decode or score.
        batch_size: the maximum number of rows of a batch.
    """

    input_length: int = 512
    target_length: int = 64
    batch_size: int = 32

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                option = f"--{field.name.replace('_', '-')}"
                raise ValueError(
                    f"{field.name} is {getattr(self, field.name)}. Set {option} to at least 1."
                )


class Server:
    """A backbone with a bank of prompts, compiled for a few lengths and numbers of rows.

    Args:
        bank: the prompt bank. Rows may be added while the server runs.
        backbone: the backbone of the prompts (`backbone.load`).
        limits: the limits of requests and batches.
    """

    def __init__(self, bank: Bank, backbone: backbones.Backbone, limits: Limits = Limits()):
        self.bank, self.backbone, self.limits = bank, backbone, limits
        self.functions = Functions(
            backbone.config,
            bank.method,
            limits.target_length,
            backbone.vocabulary,
            bank.lengths_differ,
        )
        self._predict = jax.jit(self.functions.predict)
        self._score = jax.jit(self.functions.score)
        malloc.keep_freed_memory()  # after the weights were loaded

    @classmethod
    def load(
        cls,
        prompts: Iterable[str],
        *,
        folded: bool = False,
        limits: Limits = Limits(),
        **backbone: Any,
    ) -> Server:
        """Loads a server from artifacts.

        Args:
            prompts: the artifact folders, each as FOLDER or NAME=FOLDER (see `Named`).
            folded: whether to keep plain prompts (see `Bank`).
            limits: the limits of requests and batches.
            **backbone: the arguments of `backbone.load`, except the bank.
        """
        bank = Bank.load([Named.parse(text) for text in prompts], folded)
        return cls(bank, backbones.load(bank, **backbone), limits)

    def reader(self, mode: str = "predict", truncate: bool = False) -> Reader:
        """Returns a parser of requests to this server."""
        limits = self.limits
        return Reader(
            *(self.bank, self.backbone.vocabulary, mode),
            *(limits.input_length, limits.target_length, truncate),
        )

    def answer(self, requests: Sequence[Request | Failure]) -> list[Answer]:
        """Returns one answer for each request, in their order."""
        jobs: list[_Job] = []
        for index, request in enumerate(requests):
            if isinstance(request, Request):
                targets = enumerate(request.targets or ([],))
                jobs += [_Job(index, i, request.inputs, ids, request.row) for i, ids in targets]
        outputs = dict(self._run([job for job in jobs if not job.targets], self._predictions))
        outputs |= dict(self._run([job for job in jobs if job.targets], self._scores))
        answers = []
        for index, request in enumerate(requests):
            if isinstance(request, Failure):
                answers.append({**request.label, "error": request.error})
                continue
            results = [outputs[index, i] for i in range(max(len(request.targets), 1))]
            cut = {"truncated": True} if request.truncated else {}
            answers.append({**request.label, **_answer(request, results), **cut})
        return answers

    # --- Batches ---------------------------------------------------------------------------------

    def _run(
        self, jobs: Sequence[_Job], function: Callable[[Sequence[_Job]], Any]
    ) -> Iterable[tuple[tuple[int, int], Any]]:
        """Yields ((request, target), result) for every job. Starts all batches before it waits for
        the first result, so that the device does not wait for the host."""
        ordered = sorted(jobs, key=lambda job: (len(job.inputs), len(job.targets)))
        size = self.limits.batch_size
        batches = [ordered[first : first + size] for first in range(0, len(ordered), size)]
        running = [(batch, function(batch)) for batch in batches]
        for batch, results in running:
            for job, result in zip(batch, self._finished(results), strict=False):
                yield (job.request, job.target), result

    def _predictions(self, batch: Sequence[_Job]) -> Any:
        return self._predict(
            self.backbone.params, self.bank.arrays, self._inputs(batch), self._rows(batch)
        )

    def _scores(self, batch: Sequence[_Job]) -> Any:
        limits = buckets(SHORTEST_TARGET, self.limits.target_length)
        targets = _padded([job.targets for job in batch], limits, self._size(batch))
        return self._score(
            self.backbone.params, self.bank.arrays, self._inputs(batch), targets, self._rows(batch)
        )

    def _finished(self, results: Any) -> Iterable[Any]:
        """Returns the result of every example: a score, or a prediction and its score."""
        if isinstance(results, tuple):
            ids, scores = jax.device_get(results)
            texts = (self.backbone.vocabulary.decode(row.tolist()) for row in ids)
            return list(zip(texts, scores.tolist(), strict=True))
        return jax.device_get(results).tolist()

    def _inputs(self, batch: Sequence[_Job]) -> np.ndarray:
        limits = buckets(SHORTEST_INPUT, self.limits.input_length)
        return _padded([job.inputs for job in batch], limits, self._size(batch))

    def _rows(self, batch: Sequence[_Job]) -> np.ndarray:
        rows = np.zeros(self._size(batch), np.int32)
        rows[: len(batch)] = [job.row for job in batch]
        return rows

    def _size(self, batch: Sequence[_Job]) -> int:
        return smallest(buckets(1, self.limits.batch_size, FEWER_ROWS), len(batch))


def buckets(first: int, limit: int, factor: int = 2) -> list[int]:
    """Returns the sizes to compile for: `first` times powers of `factor` below the limit, and the
    limit."""
    sizes = []
    while first < limit:
        sizes.append(first)
        first *= factor
    return [*sizes, limit]


def _padded(texts: Sequence[Sequence[int]], lengths: Sequence[int], rows: int) -> np.ndarray:
    """Returns token ids [rows, length], padded with 0. The length is the smallest of `lengths` that
    fits."""
    tokens = np.zeros((rows, smallest(lengths, max(map(len, texts)))), np.int32)
    for row, ids in enumerate(texts):
        tokens[row, : len(ids)] = ids
    return tokens


def _answer(request: Request, results: Sequence[Any]) -> Mapping[str, Any]:
    scores = [result if request.targets else result[1] for result in results]
    if not np.isfinite(scores).all():
        return {"error": NOT_FINITE.format(", ".join(map(str, scores)))}
    if request.choices:
        return {"prediction": request.choices[int(np.argmax(scores))], "scores": scores}
    if request.targets:
        return {"score": scores[0]}
    return {"prediction": results[0][0], "score": scores[0]}
