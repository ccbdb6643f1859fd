"""Captions of the toy image world, in a closed vocabulary, and their CLIP tokenizer.

A caption names some attributes of an image: `a photo of two small striped red circles on a black
background.` Every word of the vocabulary is one token; the tokenizer splits other text into bytes.
"""

from __future__ import annotations

import collections
import functools
import json
import random
import re
from typing import Any

import numpy as np

from mpt_jax.batching.clip_tokenizer import BOS, EOS, MERGES, VOCAB, ClipTokenizer, byte_characters
from mpt_jax.core.shapes import Int
from mpt_jax.tasks import toy_images as world

# Attribute -> the words for each value: its name, then synonyms.
SHAPE_WORDS = (
    ("circle", "disc"),
    ("square", "box"),
    ("triangle", "wedge"),
    ("diamond", "kite"),
    ("pentagon",),
    ("hexagon",),
    ("star",),
    ("cross", "plus"),
    ("ring", "hoop"),
    ("heart",),
    ("arrow", "pointer"),
    ("moon", "crescent"),
)
COLOR_WORDS = (
    ("red", "crimson"),
    ("green", "emerald"),
    ("blue", "azure"),
    ("yellow", "golden"),
    ("orange",),
    ("purple", "violet"),
    ("pink", "rose"),
    ("brown", "chestnut"),
    ("gray", "grey"),
    ("cyan", "turquoise"),
)
TEXTURE_WORDS = (
    ("plain", "solid"),
    ("striped", "lined"),
    ("dotted", "spotted"),
    ("checked", "checkered"),
    ("gradient", "shaded"),
    ("noisy", "grainy"),
)
BACKGROUND_WORDS = (
    ("white",),
    ("black", "dark"),
    ("beige", "sand"),
    ("navy",),
    ("mint",),
    ("maroon",),
)
SIZE_WORDS = (("small", "tiny"), ("medium", "average"), ("large", "big"))
POSITION_WORDS = (
    ("top left",),
    ("top",),
    ("top right",),
    ("left",),
    ("center", "middle"),
    ("right",),
    ("bottom left",),
    ("bottom",),
    ("bottom right",),
)
TABLES = {
    "shape": SHAPE_WORDS,
    "color": COLOR_WORDS,
    "texture": TEXTURE_WORDS,
    "background": BACKGROUND_WORDS,
    "size": SIZE_WORDS,
    "position": POSITION_WORDS,
}
ANY_SHAPE = ("thing", "object", "shape")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
OPENINGS = ("", "a photo of", "a picture of", "an image of", "a drawing of")
ARTICLES = ("a", "the", "one")

CONTEXT = 16  # text positions of the tiny CLIP, start and end included
SYNONYM_RATE = 0.3
DROP_RATE = 0.2  # of captions that leave out attributes
# Of captions whose image gets a wrong attribute. Only 3.5% are wrong, since some do not name it.
WRONG_RATE = 0.05


def plural(word: str) -> str:
    """Returns the plural of a shape."""
    return word + ("es" if word.endswith(("s", "x")) else "s")


def _vocabulary() -> tuple[str, ...]:
    shapes = [word for words in (*SHAPE_WORDS, ANY_SHAPE) for word in words]
    phrases = [word for table in TABLES.values() for words in table for word in words]
    phrases += [*ANY_SHAPE, *map(plural, shapes), *NUMBERS, *OPENINGS, *ARTICLES]
    phrases += ["on a background at the", "and"]
    return tuple(sorted({word for phrase in phrases for word in phrase.split()}))


WORDS = _vocabulary()


# --- captions --------------------------------------------------------------------------------


def captions(scenes: world.Scenes, rng: random.Random) -> list[str]:
    """Returns a random caption of each image, which fits the text tower.

    Captions leave out attributes, use synonyms, and describe a wrong attribute at the rates above.
    They never name a held-out pair.
    """
    columns = {
        "shape": scenes.shapes.tolist(),
        "color": scenes.colors.tolist(),
        "texture": scenes.textures.tolist(),
        "background": scenes.backgrounds.tolist(),
        "size": scenes.sizes.tolist(),
        "position": scenes.positions.tolist(),
    }
    found = []
    for image, count in enumerate(scenes.counts.tolist()):
        facts = {name: values[image] for name, values in columns.items()}
        text = _caption(facts, count, rng)
        while len(words_of(text)) + 2 > CONTEXT:
            text = _caption(facts, count, rng)
        found.append(text)
    return found


def words_of(text: str) -> list[str]:
    """Returns the words and full stops of a caption."""
    return re.findall(r"\w+|\.", text)


def _caption(facts: dict[str, Any], count: int, rng: random.Random) -> str:
    """Returns a caption of `count` objects, whose shapes and colors are the first of `facts`."""
    objects = list(zip(facts["shape"], facts["color"], strict=True))[:count]
    named = {name for name in ("size", "background") if rng.random() < 0.5}
    named |= {"shape", "color", "texture"}
    if count == 1 and rng.random() < 0.3:
        named.add("position")
    if rng.random() < DROP_RATE:
        named = {name for name in sorted(named) if rng.random() < 0.5}
    first = {**facts, "shape": objects[0][0], "color": objects[0][1]}
    if rng.random() < WRONG_RATE:
        _mistake(first, rng)
    if objects[0] == objects[-1]:
        noun = _noun(first, count, named, rng)
    else:
        second = {**facts, "shape": objects[1][0], "color": objects[1][1]}
        named -= {"size", "texture"}
        nouns = [_noun(x, 1, named, rng) for x in (first, second)]
        noun = " and ".join(rng.sample(nouns, 2))
    parts = [rng.choice(OPENINGS), noun]
    if "position" in named:
        parts.append(f"at the {_word(first, 'position', rng)}")
    if "background" in named:
        parts.append(f"on a {_word(first, 'background', rng)} background")
    return " ".join(filter(None, parts)) + rng.choice((".", ".", ""))


def _noun(facts: dict[str, Any], count: int, named: set[str], rng: random.Random) -> str:
    words = [rng.choice(ARTICLES) if count == 1 else NUMBERS[count]]
    order = ["size", "texture", "color"]
    if rng.random() < 0.2:
        rng.shuffle(order)
    words += [_word(facts, name, rng) for name in order if name in named]
    shape = _word(facts, "shape", rng) if "shape" in named else rng.choice(ANY_SHAPE)
    return " ".join([*words, shape if count == 1 else plural(shape)])


def _word(facts: dict[str, Any], attribute: str, rng: random.Random) -> str:
    name, *synonyms = TABLES[attribute][facts[attribute]]
    return rng.choice(synonyms) if synonyms and rng.random() < SYNONYM_RATE else name


def _mistake(facts: dict[str, Any], rng: random.Random) -> None:
    """Changes one attribute, but not into a held-out pair."""
    name = rng.choice(("shape", "color", "texture", "background", "size"))
    values = range(len(TABLES[name]))
    if name == "shape":
        values = np.flatnonzero(~world.HELD_OUT[:, facts["color"]]).tolist()
    elif name == "color":
        values = np.flatnonzero(~world.HELD_OUT[facts["shape"]]).tolist()
    facts[name] = rng.choice([value for value in values if value != facts[name]])


# --- tokenizer -------------------------------------------------------------------------------


def tokenizer_files() -> dict[str, bytes]:
    """Returns {name: content} of vocab.json and merges.txt, in which every word is one token.

    Merges are those of byte-pair encoding on the list of words, each counted once, because the
    closed vocabulary needs them all.
    """
    words = [[*word[:-1], f"{word[-1]}</w>"] for word in WORDS]
    merges: list[tuple[str, str]] = []
    while any(len(word) > 1 for word in words):
        pairs = collections.Counter(pair for w in words for pair in zip(w, w[1:], strict=False))
        left, right = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append((left, right))
        for word in words:
            for i in reversed(range(len(word) - 1)):
                if word[i : i + 2] == [left, right]:
                    word[i : i + 2] = [left + right]
    single = list(byte_characters().values())
    joined = [left + right for left, right in merges]
    tokens = [*single, *(f"{x}</w>" for x in single), *joined, BOS, EOS]
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    return {
        VOCAB: (json.dumps({token: number for number, token in enumerate(tokens)}) + "\n").encode(),
        MERGES: ("\n".join(lines) + "\n").encode(),
    }


@functools.cache
def tokenizer() -> ClipTokenizer:
    """Returns the tokenizer of the captions."""
    return ClipTokenizer(tokenizer_files(), "the toy captions")


def tokens(texts: list[str]) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    """Returns the token ids of captions, 0 after the end, and the positions of their ends."""
    code = tokenizer()
    ids, ends = np.zeros((len(texts), CONTEXT), np.int32), np.zeros(len(texts), np.int32)
    for row, text in enumerate(texts):
        own = [code.bos_id, *code.encode(text), code.eos_id]
        ids[row, : len(own)], ends[row] = own, len(own) - 1
    return ids, ends
