"""Target tasks of the toy suite told otherwise: a prefix before the text, or other labels.

Each variant has the rows and the splits of its task, and a few-shot run of it the rows of the
same run of the task; only the text of inputs or targets differs. They are for CrossPT's study of
prefixes and label words:

    toy_rte_prefixed     inputs start with the task's name, as source skills did in pretraining
    toy_rte_numeric      labels are their numbers
    toy_rte_synthetic    labels are words that have nothing to do with the question

A prompt cannot make the backbone say what it never had to say, so each label is one piece that
pretraining often had as a target:

* The vocabulary has no digits: 0 and 1 would both be <unk>. Its only numbered pieces are T5's
  sentinels, which are in a fifth of all pretraining targets; label i is `<extra_id_i>`.
* CrossPT's synthetic labels are transliterated. Here these would be spelled in letters, which were
  never a target. Ours are nouns, all of one kind in a task, which are answers of squad and of the
  word games and were never an answer to what a target task asks. Cities are in no input of
  scitail, wic and paws. The other four tasks speak of all kinds of nouns; each of their labels is
  in at most 2.5% of the inputs.

Prefixes are in letters, as the vocabulary has no target task's name. The backbone has not read
them before, so they can tell tasks apart and recall nothing.
"""

from __future__ import annotations

import dataclasses

from mpt_jax.tasks import toy_tasks
from mpt_jax.tasks.toy_tasks import ToyTask


@dataclasses.dataclass(frozen=True)
class Variant:
    """A target task told otherwise.

    Attributes:
        base: the task whose rows these are.
        suffix: what its name adds to the task's.
        labels: what is said in place of the task's labels, in their order.
        prefix: what every input starts with.
    """

    base: ToyTask
    suffix: str
    labels: tuple[str, ...]
    prefix: str = ""

    @property
    def name(self) -> str:
        """The name that it is registered by."""
        return f"{self.base.name}_{self.suffix}"

    def told(self, inputs: str, target: str) -> tuple[str, str]:
        """(inputs, targets) of the task's row as the variant has them."""
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
