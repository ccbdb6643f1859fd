"""Registration of SeqIO tasks from a suite's table of data sets.

A row of the table is a data set. `register` registers its task and, for classification, a second
task whose labels are digits (`VERSIONS`). Tasks are tokenized with the vocabulary that gin binds.
Further tasks are registered when their name is first used: versions such as `rte_unprefixed` and
`rte_synthetic` in this module, few-shot runs in `few_shot`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gin
import seqio

from mpt_jax.data import in_memory, preprocessors, task_lookup, vocabularies
from mpt_jax.evaluation import evaluator
from mpt_jax.tasks import few_shot, text_metrics
from mpt_jax.tasks.splits import Parts, PartsSource
from mpt_jax.tasks.templates import Preprocessor, without_prefix

# Suffix of a classification task's name -> its labels, given their words. The words are T5's if it
# was trained on the task; ATTEMPT and the MPT paper use digits.
VERSIONS: Mapping[str, Callable[[Sequence[str]], tuple[str, ...]]] = {
    "": tuple,
    "_digits": lambda words: tuple(str(number) for number in range(len(words))),
}

# Maps a vowel to the next vowel and a consonant to the next consonant, keeping case.
_NEXT_LETTER = {
    ord(case(letter)): case(letters[(index + 1) % len(letters)])
    for letters in ("aeiou", "bcdfghjklmnpqrstvwxyz")
    for index, letter in enumerate(letters)
    for case in (str.lower, str.upper)
}

LabelMetric = Callable[[Sequence[str]], text_metrics.Metric]


@dataclasses.dataclass(frozen=True)
class Row:
    """A data set and how to read it.

    Attributes:
        name: The name of the task, which is also the first word of every input.
        data, parts, sizes, keys, reads: The arguments of `splits.PartsSource`.
        template: The template: a function from a prefix to a preprocessor. For classification, a
            function from the labels to such a function.
        words: The name of each label number; () for free text.
        metrics: For free text, the SeqIO metrics, of which the first selects the best step. For
            classification, functions from the labels to a metric; accuracy and the rate of invalid
            predictions are added.
        accuracy_first: For classification, whether accuracy selects the best step. Otherwise, the
            first of `metrics` does.
        postprocess: The postprocessor, see `seqio.Task.postprocess_fn`.
        source: The function that returns the source, given data, parts, sizes, keys and reads.
    """

    name: str
    data: str
    parts: Parts
    sizes: Mapping[str, int]
    template: Callable[..., Any]
    words: Sequence[str] = ()
    metrics: Sequence[Callable[..., Any]] = ()
    keys: Sequence[str] = ()
    reads: Sequence[str] = ()
    accuracy_first: bool = True
    postprocess: Callable[..., Any] | None = None
    source: Callable[..., PartsSource] = PartsSource


_ROWS: dict[str, Row] = {}  # rows of all tables


class RunTask(in_memory.TextTask):
    """A SeqIO task that is tokenized with the vocabulary that gin binds after registration.

    Raises (on use):
        ValueError: gin binds no vocabulary, or not the one with which the task was first used.
    """

    _first: Any = None

    @property
    def output_features(self) -> Mapping[str, Any]:
        """The features `inputs`, `targets` and `task_ids`; see `preprocessors.output_features`."""
        vocabulary = run_vocabulary()
        if self._first is None:
            self._first = vocabulary
        if vocabulary is not self._first and vocabulary != self._first:
            raise ValueError(
                f"Task {self.name!r} was first used with the vocabulary {_shown(self._first)}, but "
                f"gin now binds {_shown(vocabulary)}. Start a new process to change VOCABULARY."
            )
        return dict(sorted(preprocessors.output_features(self._first).items()))

    def replace(self, **changes: Any) -> Any:
        """Returns a copy of this task with `changes`, which is a `RunTask` as well."""
        return super().replace(**{"output_features": {}, **changes})


def _shown(vocabulary: Any) -> str:
    path = getattr(vocabulary, "path", vocabularies.BYT5)
    path = getattr(vocabulary, "sentencepiece_model_file", path)
    return f"{path} ({vocabulary.extra_ids} extra ids)"


def run_vocabulary() -> seqio.Vocabulary:
    """Returns the vocabulary that the gin bindings of `vocabularies.load` select.

    Raises:
        ValueError: gin does not bind `vocabularies.load.path`.
    """
    try:
        gin.get_configurable(vocabularies.load)
        known = True
    except ValueError:  # no gin file has been parsed that mentions it
        known = False
    bound = gin.get_bindings(vocabularies.load) if known else {}
    if "path" not in bound:
        raise ValueError(
            "No vocabulary is bound to vocabularies.load.path, so the task cannot be tokenized. "
            "Include gin/models/prompted_t5.gin, which binds it to VOCABULARY. docs/tasks.md shows "
            "how to read a task outside a job."
        )
    return vocabularies.load(**bound)


def register(rows: Sequence[Row]) -> None:
    """Registers the tasks of a table with SeqIO."""
    for row in rows:
        _ROWS[row.name] = row
        for suffix, labels_of in VERSIONS.items():
            if row.words or not suffix:
                _add(row, suffix, labels_of(row.words))


def register_version(name: str) -> bool:
    """Registers an extra version of a task; a resolver for `task_lookup.register_task_resolver`.

    `rte_unprefixed` is rte without the task's name at the start of the inputs, and `rte_synthetic`
    is rte with meaningless labels (`synthetic_word`). Both are for CrossPT's study of prefixes and
    label words.

    Returns:
        Whether `name` is such a version of a task of the suites.
    """
    task_name, _, version = name.rpartition("_")
    row = _ROWS.get(task_name)
    if row and version == "unprefixed":
        _add(row, "_unprefixed", tuple(row.words), [without_prefix(row.name)])
    elif row and row.words and version == "synthetic":
        _add(row, "_synthetic", tuple(map(synthetic_word, row.words)))
    else:
        return False
    return True


def synthetic_word(word: str) -> str:
    """Returns a meaningless word for a label word: `entailment` becomes `ipveomnipv`.

    Each letter is replaced with another one, so different words stay different. Other characters
    are kept. CrossPT instead uses transliterated words of another language.
    """
    return word.translate(_NEXT_LETTER)


def _label_metrics(row: Row, labels: Sequence[str]) -> list[Callable[..., Any]]:
    ranked = [evaluator.with_labels(text_metrics.accuracy, labels)]
    others = [make(labels) for make in row.metrics]
    first = ranked + others if row.accuracy_first else others + ranked
    return [*first, text_metrics.invalid_rate(labels)]


def _add(
    row: Row, suffix: str, labels: tuple[str, ...], steps: Sequence[Preprocessor] = ()
) -> None:
    """Registers a version of a row's task. `steps` are extra preprocessors that change its text."""
    name = row.name + suffix
    template = row.template(labels) if labels else row.template
    metrics = _label_metrics(row, labels) if labels else row.metrics
    task = RunTask(
        name,
        source=row.source(row.data, row.parts, row.sizes, row.keys, row.reads),
        output_features={},
        preprocessors=[template(row.name), *steps, *preprocessors.finish(name)],
        postprocess_fn=row.postprocess,
        metric_fns=[text_metrics.of_task(name, metric) for metric in metrics],
    )
    few_shot.draw_as(task, row.name)
    seqio.TaskRegistry.add_provider(name, task)


task_lookup.register_task_resolver(register_version)
