"""Named SeqIO mixtures of the MPT paper's tasks: importing this module registers `MIXTURES`.

    import mpt_jax.tasks.mixtures
    seqio.get_mixture_or_task("mpt_source_6").get_dataset(lengths, "train", seed=42)

The mixtures are for direct use with SeqIO. The stages in gin/ instead name tasks and mix them with
a sampler (`mpt_jax.data.sampling`). The mixing rate of a task is its number of rows, at most `CAP`,
as in T5. For ReCoRD, rows are queries, each of which yields one or more examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import seqio

from mpt_jax.tasks import extra_sources, glue, mpt_others, mrqa, super_glue  # noqa: F401  # they register the tasks

CAP = 2**18

SOURCE_6 = ("mnli", "qqp", "qnli", "sst2", "squad", "record")
EXTRA_SOURCES = ("agnews", "commonsenseqa", "openbookqa", "arc_easy", "anli_r3", "winogrande")

_SOURCES = {"mpt_source_6": SOURCE_6, "mpt_source_12": SOURCE_6 + EXTRA_SOURCES}

MIXTURES: Mapping[str, Sequence[str]] = {
    **_SOURCES,
    # Leave-one-out mixtures, which measure what each source adds. The paper has none.
    **{
        f"{name}_without_{left_out}": tuple(task for task in tasks if task != left_out)
        for name, tasks in _SOURCES.items()
        for left_out in tasks
    },
    "glue_targets": tuple(row.name for row in glue.ROWS),
    "super_glue_targets": ("multirc", "boolq", "wic", "wsc", "cb"),
    "mrqa_targets": ("nq", "hotpotqa", "searchqa", "newsqa"),
    "others_targets": tuple(row.name for row in mpt_others.ROWS),
}


class RunMixture(seqio.Mixture):
    """A SeqIO mixture that is constructed when an attribute is first accessed.

    The constructor of `seqio.Mixture` reads the features of its tasks, but a `suite.RunTask` has no
    features before gin binds a vocabulary.

    Args:
        name: The name of the mixture.
        task_names: The names of the registered SeqIO tasks.
        rate: The function that returns the mixing rate of a task.
    """

    _late: tuple[Any, ...] | None = None

    def __init__(self, name: str, task_names: Sequence[str], rate: Callable[[seqio.Task], float]):
        self._name = name
        self._late = (name, list(task_names), rate)

    def __getattr__(self, attribute: str) -> Any:
        """Constructs the mixture if it is not yet constructed, and returns the attribute."""
        if self._late is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {attribute!r}.")
        arguments, self._late = self._late, None
        try:
            super().__init__(*arguments)
        except ValueError:  # no vocabulary yet
            self._late = arguments
            raise
        return getattr(self, attribute)


def capped_size(task: seqio.Task) -> float:
    """Returns the mixing rate of a task: the rows of its training split, at most `CAP`."""
    return float(min(task.num_input_examples("train"), CAP))


for _name, _tasks in MIXTURES.items():
    seqio.MixtureRegistry.add_provider(_name, RunMixture(_name, _tasks, capped_size))
