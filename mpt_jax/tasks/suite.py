"""How a suite's table of rows becomes SeqIO tasks.

A row is one data set; `register` makes its task, and for a classification task a second one whose
labels are digits (`VERSIONS`). Tasks are tokenized with the vocabulary that the run binds in gin.
What needs no row is made of its name when a run asks for it: `rte_unprefixed` and `rte_synthetic`
here, runs on a few examples of a task in `few_shot`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gin
import seqio

from mpt_jax.data import preprocessors, task_lookup, vocabularies
from mpt_jax.evaluation import evaluator
from mpt_jax.tasks import few_shot, text_metrics
from mpt_jax.tasks.splits import Parts, PartsSource
from mpt_jax.tasks.templates import Preprocessor, without_prefix

# Suffix of a classification task's name -> what its labels are called, given their words. Words are
# T5's own where it was trained on the task; digits are ATTEMPT's and the MPT paper's.
VERSIONS: Mapping[str, Callable[[Sequence[str]], tuple[str, ...]]] = {
    "": tuple,
    "_digits": lambda words: tuple(str(number) for number in range(len(words))),
}

# The next vowel for a vowel and the next consonant for a consonant, in lower and upper case.
_NEXT_LETTER = {
    ord(case(letter)): case(letters[(place + 1) % len(letters)])
    for letters in ("aeiou", "bcdfghjklmnpqrstvwxyz")
    for place, letter in enumerate(letters)
    for case in (str.lower, str.upper)
}

LabelMetric = Callable[[Sequence[str]], text_metrics.Metric]


@dataclasses.dataclass(frozen=True)
class Row:
    """A data set and how it is read.

    Attributes:
        name: of the task, and the first word of every input.
        data, parts, sizes, keys, reads: see `splits.PartsSource`.
        template: prefix -> preprocessor; where there are labels, labels -> prefix -> preprocessor.
        words: what each label number is called; () for tasks of free text.
        metrics: SeqIO metrics; where there are labels, made of them beside accuracy and the rate
            of what is no label. The first one selects.
        accuracy_first: whether accuracy selects, and not the first of `metrics`.
        postprocess: see `seqio.Task.postprocess_fn`.
        source: makes the source of `data`, parts, sizes, keys and reads.
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


_ROWS: dict[str, Row] = {}  # of all tables


class RunTask(seqio.Task):
    """A SeqIO task whose vocabulary is that of the run, which gin knows after tasks are registered.

    Raises (on use):
        ValueError: gin binds no vocabulary, or another one than this task was first used with:
            its examples are kept as tokens.
    """

    _first: Any = None

    @property
    def output_features(self) -> Mapping[str, Any]:
        """Inputs, targets and task ids, as `features.output_features` has them."""
        vocabulary = run_vocabulary()
        if self._first is None:
            self._first = vocabulary
        if vocabulary is not self._first and vocabulary != self._first:
            raise ValueError(
                f"Task {self.name!r} was tokenized with {self._first} in this process, and gin "
                f"now binds {vocabulary}. Start a new process."
            )
        return dict(sorted(preprocessors.output_features(self._first).items()))

    def replace(self, **changes: Any) -> RunTask:
        """Returns this task with `changes`, as SeqIO's does; its vocabulary is the run's too."""
        same = {
            "source": self.source,
            "output_features": {},
            "preprocessors": self.preprocessors,
            "postprocess_fn": self.postprocessor,
            "metric_fns": self.metric_fns,
        }
        return RunTask(**{**same, **changes})


def run_vocabulary() -> seqio.Vocabulary:
    """Returns the vocabulary that gin binds to `vocabularies.load`.

    Raises:
        ValueError: it binds none.
    """
    try:
        gin.get_configurable(vocabularies.load)
        known = True
    except ValueError:  # no gin file has been parsed that mentions it
        known = False
    bound = gin.get_bindings(vocabularies.load) if known else {}
    if "path" not in bound:
        raise ValueError(
            "No vocabulary is bound to vocabularies.load.path, and real tasks have none of their "
            "own. gin/models/prompted_t5.gin binds VOCABULARY to it; docs/tasks.md shows how to "
            "read a task without a run."
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
    """Registers a version that no table has; a naming scheme, see `examples.name_tasks_with`.

    `rte_unprefixed` is rte without its name at the start of the inputs; `rte_synthetic` has labels
    that mean nothing (`nonsense`), for CrossPT's study of prefixes and label words.

    Returns:
        Whether it is the name of such a version of a task of the suites.
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
    """A made-up word in place of one that means something: `entailment` becomes `ipveomnipv`.

    Letters are replaced one by one, so different words stay different; whatever is no letter stays.
    (CrossPT has words of another language in Latin letters.)
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
    """Registers a version of a row's task; `steps` change its text."""
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
