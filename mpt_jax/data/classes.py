"""Classes of image tasks: their names in label order, and the text templates around a name.

A task's classes are the vocabulary of its output feature `targets`. Derived tasks (few-shot
subsets, runs) keep the output features of their task, and with them its classes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, cast

import seqio
import tensorflow as tf

TARGETS = "targets"
PLACE = "{}"  # of the class name in a template

Names = Sequence[str] | Callable[[], Sequence[str]]


class ClassVocabulary(seqio.PassThroughVocabulary):
    """Vocabulary whose ids are the class ids of one image task.

    All class vocabularies compare as equal, because SeqIO mixes only tasks with equal vocabularies,
    and the class ids of a mixture are local to the task of each example. Compare `digest` to find
    out whether two tasks have the same classes.

    Args:
        names: The class names in label order, or a function that returns them when they are first
            needed, so that registering a task reads no data.
        templates: The texts in which `{}` stands for a class name.
        multi_label: Whether an image may have any number of classes, instead of exactly one.

    Raises:
        ValueError: a template is invalid. On use: a name is empty or has white space around it or
            an underscore, or two names are equal after `normalized`.
    """

    def __init__(self, names: Names, templates: Sequence[str], multi_label: bool = False):
        self._given_names = names
        self.templates = check_templates(templates)
        self.multi_label = multi_label
        super().__init__(size=0)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The class names in label order."""
        given = self._given_names
        return check_names(given() if callable(given) else given)

    @functools.cached_property
    def digest(self) -> str:
        """The SHA-256 of names, templates and `multi_label`, as hexadecimal digits."""
        content = [list(self.names), list(self.templates), self.multi_label]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def texts(self, template: str | None = None) -> list[str]:
        """Returns the text of each class in label order; the first template if none is given."""
        return [(template or self.templates[0]).replace(PLACE, name) for name in self.names]

    def _decode(self, ids: Sequence[Any]) -> str:
        """Returns the names of the classes with these integer ids, separated by commas."""
        return ", ".join(self.names[number] for number in ids)

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        """Returns what `_decode` does for the ids [..., N], with which T5X's inference decodes."""
        return tf.strings.reduce_join(tf.gather(self.names, ids), axis=-1, separator=", ")

    @property
    def _base_vocab_size(self) -> int:
        return len(self.names)

    @property
    def size(self) -> int:
        """The number of classes."""
        return len(self.names)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, ClassVocabulary)

    def __hash__(self) -> int:
        return hash(ClassVocabulary)

    def __str__(self) -> str:
        return f"ClassVocabulary({len(self.names)} classes, digest {self.digest[:8]})"

    __repr__ = __str__


def classes_of(task: seqio.Task | seqio.Mixture) -> ClassVocabulary:
    """Returns the classes of an image task.

    Raises:
        ValueError: the task is not an image task, or is a mixture.
    """
    if isinstance(task, seqio.Mixture):
        raise ValueError(
            f"{task.name!r} is a mixture, whose tasks have separate classes. Ask for the classes "
            "of each of its tasks, see seqio.get_subtasks."
        )
    if not is_image_task(task):
        raise ValueError(
            f"Task {task.name!r} has no classes, because it is not an image task. Name a task that "
            "mpt_jax.tasks.images.register registered."
        )
    return cast(ClassVocabulary, task.output_features[TARGETS].vocabulary)


def is_image_task(task: seqio.Task | seqio.Mixture) -> bool:
    """Whether a task is an image task, or a mixture of such tasks."""
    # The output features of a text task may need a vocabulary that no job has bound yet.
    try:
        features = task.output_features
    except ValueError:
        return False
    return TARGETS in features and isinstance(features[TARGETS].vocabulary, ClassVocabulary)


def normalized(name: str) -> str:
    """Returns a class name in lower case with its words separated by single spaces, for comparing
    names of different sources: `Yin_Yang` and `yin-yang` are both `yin yang`."""
    return " ".join(re.sub(r"[\W_]+", " ", name.casefold()).split())


def readable(class_id: str) -> str:
    """Returns the display name of a class of a data set: underscores and other white space become
    single spaces."""
    return " ".join(class_id.replace("_", " ").split())


def check_names(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the class names of a task.

    Raises:
        ValueError: there are fewer than two names; a name is empty, is not text, or has extra white
            space or an underscore; or two names are equal after `normalized`.
    """
    if isinstance(names, str) or len(names) < 2:
        raise ValueError(
            f"Class names must be a sequence of at least two names, got {names!r}. Pass a list "
            "with one name for each class."
        )
    seen: dict[str, str] = {}
    for name in names:
        if not isinstance(name, str) or not normalized(name) or name != " ".join(name.split()):
            raise ValueError(
                f"The class name {name!r} is empty, not text, or has extra white space. Use words "
                "separated by single spaces."
            )
        if "_" in name:
            raise ValueError(
                f"The class name {name!r} has an underscore, which a model would read as a "
                "character. Write spaces instead."
            )
        if (key := normalized(name)) in seen:
            raise ValueError(
                f"The class names {seen[key]!r} and {name!r} are the same after normalization, so "
                "their texts cannot be distinguished. Rename one of the classes."
            )
        seen[key] = name
    return tuple(names)


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """Returns the templates; raises ValueError unless each is text with one `{}` in it."""
    if isinstance(templates, str) or not templates:
        raise ValueError(
            f"Templates must be a sequence of at least one text, got {templates!r}. Pass a tuple, "
            "such as ('a photo of a {}.',)."
        )
    for template in templates:
        if not isinstance(template, str) or template.count(PLACE) != 1:
            raise ValueError(
                f"The template {template!r} does not contain {PLACE} exactly once. Write {PLACE} "
                "where the class name belongs, as in 'a photo of a {}.'."
            )
    return tuple(templates)
