"""Captions of the toy image world: their words, their truth, and their tokenizer."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest

from mpt_jax.tasks import toy_captions, toy_image_tasks
from mpt_jax.tasks import toy_images as world

COUNT = 4000
VALUE = {
    name: {word: value for value, words in enumerate(table) for word in words}
    for name, table in toy_captions.TABLES.items()
}
SHAPE = VALUE["shape"] | {toy_captions.plural(w): v for w, v in VALUE["shape"].items()}


@pytest.fixture(scope="module")
def equal():
    scenes = world.sample(COUNT, world.generator("captions"))
    return scenes, toy_captions.captions(scenes, random.Random(0))


@pytest.fixture(scope="module")
def different():
    scenes = world.sample_different(COUNT, world.generator("different captions"))
    return scenes, toy_captions.captions(scenes, random.Random(1))


def named(text: str, values: dict[str, int]) -> set[int]:
    return {values[word] for word in text.replace(".", "").split() if word in values}


def nouns(text: str) -> list[tuple[set[int], set[int]]]:
    """The shapes and colors of each object that a caption names."""
    before_background = re.sub(r" on a .*", "", text)
    return [
        (named(part, SHAPE), named(part, VALUE["color"]))
        for part in before_background.split(" and ")
    ]


def test_words_are_those_of_the_closed_vocabulary_and_all_are_used(equal, different):
    texts = equal[1] + different[1]
    assert texts == toy_captions.captions(equal[0], random.Random(0)) + different[1]
    used = {word for text in texts for word in re.findall(r"[^ .]+", text)}
    unused = {"zero", "five", "six", "seven", "eight", "nine"}  # words of toy_digits only
    assert used == set(toy_captions.WORDS) - unused
    assert 110 <= len(toy_captions.WORDS) <= 130
    assert max(len(toy_captions.words_of(text)) for text in texts) == toy_captions.CONTEXT - 2


def test_names_of_attributes_are_those_of_the_images():
    assert tuple(words[0] for words in toy_captions.SHAPE_WORDS) == world.SHAPES
    assert tuple(words[0] for words in toy_captions.COLOR_WORDS) == tuple(world.COLORS)
    assert tuple(words[0] for words in toy_captions.TEXTURE_WORDS) == world.TEXTURE_NAMES
    assert tuple(words[0] for words in toy_captions.BACKGROUND_WORDS) == tuple(world.BACKGROUNDS)
    assert tuple(words[0] for words in toy_captions.SIZE_WORDS) == world.SIZES
    for number, (word, *_) in enumerate(toy_captions.POSITION_WORDS):
        places = world.ROWS[number // 3], world.COLUMNS[number % 3]
        assert word == (" ".join(filter(None, places)) or "center")
    for table in toy_captions.TABLES.values():  # no word means two things
        words = [word for words in table for word in words]
        assert len(words) == len(set(words))


def test_captions_describe_their_image_except_for_a_few(equal):
    scenes, texts = equal
    wrong = dropped = 0
    for image, text in enumerate(texts):
        shown = {
            "shape": scenes.shapes[image, 0],
            "color": scenes.colors[image, 0],
            "texture": scenes.textures[image],
            "background": scenes.backgrounds[image],
            "size": scenes.sizes[image],
        }
        tables = VALUE | {"shape": SHAPE}
        found = {name: named(text, tables[name]) for name in shown}
        assert all(len(values) <= 1 for values in found.values())
        wrong += any(values - {shown[name]} for name, values in found.items())
        dropped += any(not found[name] for name in ("shape", "color", "texture"))
        number = named(text, {word: i for i, word in enumerate(toy_captions.NUMBERS)})
        assert number - {1} == {scenes.counts[image]} - {1}
        if match := re.search(r" at the ([a-z ]+?)(?: on a |\.|$)", text):
            assert VALUE["position"][match[1]] == scenes.positions[image]
    # A mistake about an attribute that the caption leaves out does not show: three attributes are
    # in 90% of captions, two in 45%.
    assert wrong / COUNT == pytest.approx(0.05 * (3 * 0.9 + 2 * 0.45) / 5, abs=0.009)
    assert dropped / COUNT == pytest.approx(0.2 * (1 - 0.5**3), abs=0.02)


def test_no_caption_names_a_held_out_pair(equal, different):
    pairs = 0
    for text in equal[1] + different[1]:
        for shapes, colors in nouns(text):
            for shape in shapes:
                for color in colors:
                    assert not world.HELD_OUT[shape, color], text
                    pairs += 1
    assert pairs > 5000


def test_captions_of_different_objects_name_two_of_the_first_ones(different):
    scenes, texts = different
    for image, text in enumerate(texts):
        parts = nouns(text)
        assert len(parts) == min(2, scenes.counts[image])
        shown = set(scenes.shapes[image, : scenes.counts[image]].tolist())
        if all(shapes for shapes, _ in parts):
            assert len(set.union(*(shapes for shapes, _ in parts)) & shown) >= len(parts) - 1


# --- tokenizer -------------------------------------------------------------------------------


def test_every_word_is_one_token_and_texts_survive_a_round_trip(equal):
    tokenizer = toy_captions.tokenizer()
    assert tokenizer.vocab_size <= 1000
    assert tokenizer.eos_id == tokenizer.vocab_size - 1  # as transformers finds the end of a text
    ids = [tokenizer.encode(word) for word in toy_captions.WORDS]
    assert {len(x) for x in ids} == {1} and len({x[0] for x in ids}) == len(ids)
    for text in equal[1][:200]:
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace(".", " .")
    for text in ("Zebra, 12 ünits!", "0 1 2 3 4 5 6 7 8 9"):  # from outside the world
        assert tokenizer.decode(tokenizer.encode(text)).replace(" ", "") == text.lower().replace(
            " ", ""
        )


def test_tokens_of_captions_are_padded_and_end_where_the_end_is():
    texts = ["a red circle.", "the small thing"]
    ids, ends = toy_captions.tokens(texts)
    code = toy_captions.tokenizer()
    assert ids.shape == (2, 16) and ends.tolist() == [5, 4]
    for row, end, text in zip(ids, ends, texts, strict=True):
        assert row[: end + 1].tolist() == [code.bos_id, *code.encode(text), code.eos_id]
        assert not row[end + 1 :].any()


@pytest.mark.parametrize("name", toy_image_tasks.TASKS)
def test_class_texts_consist_of_words_of_captions_and_fit_the_context(name):
    task = toy_image_tasks.TASKS[name]
    texts = [t.replace("{}", c) for t in task.templates for c in task.class_names]
    assert all(
        set(toy_captions.words_of(text)) - {"."} <= set(toy_captions.WORDS) for text in texts
    )
    assert len(set(texts)) == len(texts)
    toy_captions.tokens(texts)
    assert max(len(toy_captions.words_of(x)) for x in task.class_names) <= 3  # room for a prompt


@pytest.mark.parity
def test_transformers_tokenizer_gives_the_same_ids(tmp_path, equal):
    import transformers

    for name, content in toy_captions.tokenizer_files().items():
        (tmp_path / name).write_bytes(content)
    theirs = transformers.CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    ids, ends = toy_captions.tokens(equal[1][:300])
    for row, end, text in zip(ids, ends, equal[1], strict=False):
        np.testing.assert_array_equal(row[: end + 1], theirs(text)["input_ids"])
