"""Variants of the toy suite's target tasks: a prefix before the text, or other labels.

Each variant has the same rows and splits as its base task, also in few-shot runs. Only the text of
its inputs or targets differs. The variants are for CrossPT's study of prefixes and label words:

    toy_rte_prefixed     inputs start with the task's name, as source skills did in pretraining
    toy_rte_numeric      labels are numbers
    toy_rte_synthetic    labels are words unrelated to the question

A prompt cannot make the backbone generate words that were never pretraining targets. So each label
is one vocabulary piece that was often a target in pretraining:

* The vocabulary has no digits: 0 and 1 would both be <unk>. Its only numbered pieces are T5's
  sentinels, which occur in a fifth of all pretraining targets; label i is `<extra_id_i>`.
* CrossPT's synthetic labels are transliterated words. The toy vocabulary would spell them in
  letters, which were never targets. Our labels are nouns, all of one kind in a task. They are
  answers of squad and of the word games, but never answers to the question of a target task.
  Scitail, wic and paws use cities, which do not occur in their inputs. The other four tasks use all
  kinds of nouns in their inputs; each of their labels occurs in at most 2.5% of the inputs.

Prefixes are spelled in letters, because the vocabulary does not contain the names of target tasks.
The backbone has never read them, so they can distinguish tasks but cannot recall a skill.
"""

from __future__ import annotations

import dataclasses

from mpt_jax.tasks import toy_tasks
from mpt_jax.tasks.toy_tasks import ToyTask


@dataclasses.dataclass(frozen=True)
class Variant:
    """A target task with another prefix or other labels.

    Attributes:
        base: The task that provides the rows.
        suffix: The suffix of the variant's name.
        labels: The labels of the variant, in the order of the base task's labels.
        prefix: The text at the start of every input.
    """

    base: ToyTask
    suffix: str
    labels: tuple[str, ...]
    prefix: str = ""

    @property
    def name(self) -> str:
        """The name under which the variant is registered."""
        return f"{self.base.name}_{self.suffix}"

    def told(self, inputs: str, target: str) -> tuple[str, str]:
        """Returns the variant's (inputs, targets) for a row of the base task."""
        return self.prefix + inputs, self.labels[self.base.labels.index(target)]


def _variants(base: ToyTask, synthetic: tuple[str, ...]) -> tuple[Variant, ...]:
    numbers = tuple(f"<extra_id_{number}>" for number in range(len(base.labels)))
    return (
        Variant(base, "prefixed", base.labels, f"{base.name.removeprefix('toy_')} : "),
        Variant(base, "numeric", numbers),
        Variant(base, "synthetic", synthetic),
    )


_TARGETS = {task.name: task for task in toy_tasks.TARGET_TASKS}
VARIANTS = (
    *_variants(_TARGETS["toy_boolq"], synthetic=("donkey", "hamster")),
    *_variants(_TARGETS["toy_cb"], synthetic=("singer", "waiter", "dancer")),
    *_variants(_TARGETS["toy_rte"], synthetic=("wine", "pasta")),
    *_variants(_TARGETS["toy_mrpc"], synthetic=("lizard", "pony")),
    *_variants(_TARGETS["toy_wic"], synthetic=("lisbon", "madrid")),
    *_variants(_TARGETS["toy_scitail"], synthetic=("athens", "dublin")),
    *_variants(_TARGETS["toy_paws"], synthetic=("tokyo", "prague")),
)
