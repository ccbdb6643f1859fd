"""Writes cider_d.json: what the COCO caption code scores with what it calls CIDEr.

Texts are lower case and split at spaces, so that both sides see the same words. Needs no Java, and
`pip install pycocoevalcap==1.2`: `python tests/golden/make_cider.py`.
"""

import json
import random
from pathlib import Path

VOCABULARY = "the a cat dog café sat ran on under mat 日本 , . is was big small and".split()


def sentence(rng: random.Random, longest: int) -> str:
    """Words of the vocabulary, drawn one by one; at least one."""
    return " ".join(rng.choices(VOCABULARY, k=rng.randint(1, longest)))


def near(rng: random.Random, text: str) -> str:
    """A text with every fifth word, on average, left out, doubled or replaced."""
    words = []
    for word in text.split():
        change = rng.random()
        replaced = [rng.choice(VOCABULARY)] if change < 0.07 else [word]
        words += [] if change > 0.93 else replaced * (2 if 0.07 <= change < 0.14 else 1)
    return " ".join(words)


def cases(rng: random.Random) -> dict[str, dict]:
    """One and many references; predictions that are empty or share no word with any reference."""
    found = {}
    for name, count, most in (("one reference", 12, 1), ("many references", 30, 6), ("two", 2, 3)):
        targets = [[sentence(rng, 25)] for _ in range(count)]
        for target in targets:
            target += [near(rng, target[0]) for _ in range(rng.randrange(most))]
        predictions = [near(rng, rng.choice(target)) for target in targets]
        found[name] = {"targets": targets, "predictions": predictions}
    found["many references"]["predictions"][3:5] = ["", "unheard of"]
    return found


if __name__ == "__main__":
    from pycocoevalcap.cider.cider import Cider

    made = cases(random.Random(0))
    for case in made.values():
        references = dict(enumerate(case["targets"]))
        case["score"] = float(
            Cider().compute_score(references, {i: [p] for i, p in enumerate(case["predictions"])})[
                0
            ]
        )
    text = json.dumps(made, ensure_ascii=False, indent=1)
    Path(__file__).with_name("cider_d.json").write_text(text + "\n")
