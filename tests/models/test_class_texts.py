"""Class texts against sequences written by hand, and errors of names, templates and lengths."""

import numpy as np
import pytest

from mpt_jax.models.class_texts import TaskClasses, class_texts
from tests.fixtures import tiny_clip

START, END, DOT = 0, 1, 2
A, THE, CAT, DOG, SMALL, BIRD, SQUARE, DISC = range(3, 11)
# Positions of a context of 2 and of 3, of 'cat' and of 'small bird': (ids, slots) without padding.
SEQUENCES = {
    ("end", 3): [
        ([START, 0, 0, 0, CAT, DOT, END], [0, 1, 2, 3, 0, 0, 0]),
        ([START, 0, 0, 0, SMALL, BIRD, DOT, END], [0, 1, 2, 3, 0, 0, 0, 0]),
    ],
    ("middle", 3): [
        ([START, 0, CAT, 0, 0, DOT, END], [0, 1, 0, 2, 3, 0, 0]),
        ([START, 0, SMALL, BIRD, 0, 0, DOT, END], [0, 1, 0, 0, 2, 3, 0, 0]),
    ],
    ("front", 3): [
        ([START, CAT, 0, 0, 0, DOT, END], [0, 0, 1, 2, 3, 0, 0]),
        ([START, SMALL, BIRD, 0, 0, 0, DOT, END], [0, 0, 0, 1, 2, 3, 0, 0]),
    ],
    ("end", 2): [
        ([START, 0, 0, CAT, DOT, END], [0, 1, 2, 0, 0, 0]),
        ([START, 0, 0, SMALL, BIRD, DOT, END], [0, 1, 2, 0, 0, 0, 0]),
    ],
    ("middle", 2): [
        ([START, 0, CAT, 0, DOT, END], [0, 1, 0, 2, 0, 0]),
        ([START, 0, SMALL, BIRD, 0, DOT, END], [0, 1, 0, 0, 2, 0, 0]),
    ],
    ("front", 2): [
        ([START, CAT, 0, 0, DOT, END], [0, 0, 1, 2, 0, 0]),
        ([START, SMALL, BIRD, 0, 0, DOT, END], [0, 0, 0, 1, 2, 0, 0]),
    ],
}


def made(names, templates=("{}.",), context=0, positions=12, position="end", task="pets"):
    classes = TaskClasses(task, tuple(names), tuple(templates))
    return class_texts([classes], tiny_clip.Tokenizer(), positions, context, position)


@pytest.mark.parametrize(("position", "context"), SEQUENCES)
def test_class_texts_context_as_written_by_hand(position, context):
    found = made(["cat", "small_bird"], context=context, position=position)
    assert found.tokens.shape == found.slots.shape == (2, 8)
    for row, (ids, slots) in enumerate(SEQUENCES[position, context]):
        rest = 8 - len(ids)
        assert found.tokens[row].tolist() == ids + [0] * rest
        assert found.slots[row].tolist() == slots + [0] * rest
        # SOT, M positions, n tokens of the name and "." stand before the end.
        assert found.eot[row] == len(ids) - 1 == context + (1 + row) + 2
    assert found.class_of_text.tolist() == [0, 1]
    for array in (found.tokens, found.slots, found.eot, found.class_of_text):
        assert array.dtype == np.int32


class Merging(tiny_clip.Tokenizer):
    """Merges "?." into one token, as CLIP's tokenizer does."""

    def encode(self, text):
        head, found, tail = text.partition("?")
        merged = {"": [50], ".": [51]}[tail] if found else []
        return [*super().encode(head), *merged]


@pytest.mark.parametrize(
    ("position", "slots"),
    [
        ("end", [0, 1, 2, 0, 0, 0, 0, 0]),
        ("middle", [0, 1, 0, 0, 2, 0, 0, 0]),
        ("front", [0, 0, 0, 1, 2, 0, 0, 0]),
    ],
)
def test_class_texts_name_that_merges_with_stop(position, slots):
    """CoOp reads the tokens of "cat?.", whose end is one token, not those of "cat?" and "."."""
    classes = TaskClasses("pets", ("cat?",))
    found = class_texts([classes], Merging(), 12, 2, position)
    assert found.slots.tolist() == [slots] and found.eot.tolist() == [5]
    (ids,) = found.tokens
    assert ids[np.array(slots) == 0].tolist() == [START, CAT, 51, END, 0, 0]


def test_class_texts_context_ignores_templates():
    found = made(["cat"], ["the {}.", "a {}."], context=2)
    assert found.tokens.tolist() == [[START, 0, 0, CAT, DOT, END, 0, 0]]


def test_class_texts_templates_one_text_each_in_order_of_classes():
    shapes = TaskClasses("shapes", ("square", "disc"), ("a {}.",), multi_label=True)
    pets = TaskClasses("pets", ("cat", "small_bird"), ("{}.", "the {}"))
    found = class_texts([pets, shapes], tiny_clip.Tokenizer(), 12)
    expected = [
        [START, CAT, DOT, END],
        [START, THE, CAT, END],
        [START, SMALL, BIRD, DOT, END],
        [START, THE, SMALL, BIRD, END],
        [START, A, SQUARE, DOT, END],
        [START, A, DISC, DOT, END],
    ]
    assert [row[: end + 1].tolist() for row, end in zip(found.tokens, found.eot, strict=True)] == (
        expected
    )
    assert found.class_of_text.tolist() == [0, 0, 1, 1, 2, 3]
    assert not found.slots.any()
    assert (found.num_classes, found.most_classes, found.has_multi_label) == (4, 2, True)
    assert [found.first_class(task) for task in ("pets", "shapes")] == [0, 2]
    assert found.of_task("shapes") is shapes
    with pytest.raises(ValueError, match="'plants'.*pets, shapes"):
        found.first_class("plants")


@pytest.mark.parametrize(
    ("words", "positions", "length"), [(5, 20, 8), (6, 20, 16), (13, 20, 16), (14, 20, 20)]
)
def test_class_texts_cut_to_multiple_of_eight_within_positions(words, positions, length):
    """The longest text has its words, start, end and "."; shorter texts are padded."""
    found = made(["cat", " ".join(["dog"] * words)], positions=positions)
    assert found.eot.tolist() == [3, words + 2]
    assert found.tokens.shape == (2, length)


def test_class_texts_longest_that_fits():
    found = made(["dog dog"], context=3, positions=8)
    assert found.tokens.shape == (1, 8) and found.eot.tolist() == [7]


def test_class_texts_too_long_error_names_class_and_lengths():
    with pytest.raises(ValueError) as error:
        made(["cat", "small bird"], context=4, positions=8)
    said = str(error.value)
    assert "'small bird'" in said and "'pets'" in said
    assert "9 positions" in said and "context of 4" in said and "has 8" in said
    with pytest.raises(ValueError, match=r"'small bird' .* 6 positions .*'the \{\}\.'.* has 5"):
        made(["cat", "small bird"], ["the {}."], positions=5)


@pytest.mark.parametrize(
    ("names", "templates", "words"),
    [
        ([], ["{}."], "'pets' has no classes"),
        (["cat", " _ "], ["{}."], "Class 1 of the task 'pets' has an empty name"),
        (["small bird", "cat", "Small_Bird"], ["{}."], "'small bird' for 0 and 2"),
        (["cat"], ["a {}.", "a photo."], "'a photo.' of the task 'pets' has no {}"),
    ],
)
@pytest.mark.parametrize("context", [0, 2])
def test_class_texts_unusable_names_error_names_task(names, templates, words, context):
    with pytest.raises(ValueError) as error:
        made(names, templates, context=context)
    assert words in str(error.value)


def test_class_texts_unknown_position_error_names_known():
    with pytest.raises(ValueError, match="CONTEXT_POSITION.*'start'.*Known: end, front, middle"):
        made(["cat"], context=2, position="start")


def test_sha256_depends_on_all_texts():
    digests = {
        made(["cat", "dog"], context=2).sha256,
        made(["dog", "cat"], context=2).sha256,
        made(["cat", "dog"], context=3).sha256,
        made(["cat", "dog"], context=2, position="middle").sha256,
        made(["cat", "dog"]).sha256,
        made(["cat", "dog"], ["the {}."]).sha256,
        made(["cat"]).sha256,
    }
    assert len(digests) == 7
    assert made(["cat", "dog"]).sha256 == made(["cat", "dog"]).sha256


def test_class_texts_equal_classes_are_shared():
    """Few-shot draws of a task have one text of each class; other templates make other texts."""
    names = ("cat", "dog")
    tasks = [
        TaskClasses("pets_k1_s0", names, ("a {}.",)),
        TaskClasses("others", ("disc", "square", "bird"), ("a {}.",)),
        TaskClasses("pets_k1_s1", names, ("a {}.",)),
        TaskClasses("pets_of_the", names, ("the {}.",)),
    ]
    found = class_texts(tasks, tiny_clip.Tokenizer(), 12)
    assert found.num_classes == len(found.tokens) == 2 + 3 + 2
    assert found.first == (0, 2, 0, 5)
    assert found.first_class("pets_k1_s1") == 0 and found.of_task("pets_k1_s1") == tasks[2]
    prompted = class_texts(tasks, tiny_clip.Tokenizer(), 12, 2)
    assert prompted.first == (0, 2, 0, 0)  # a context replaces the templates
