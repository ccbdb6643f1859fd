"""Pretraining data of the tiny backbone: span corruption, word games and source skills.

Like T5 1.0, the backbone is pretrained on span corruption together with supervised tasks with
textual prefixes. The supervised tasks are the six source tasks (source skills) and four small word
games; target tasks are not included. Two choices help a small network to learn to match words
across sentences:

* The word games, and span corruption over facts stated twice, require the lookup behind all skills
  in a simpler form, many times per example (a curriculum by mixing).
* Label words are named in the prefix (`game yes no :`), so that every label word of the suite is
  often a target, with several games and source skills. A skill never answers with the label words
  of a target task that asks the same question.

All examples are drawn from the train split of the world and consist of its words. A sentinel is
written as the word `<i>`.
"""

from __future__ import annotations

import random

from mpt_jax.tasks import toy_tasks as suite
from mpt_jax.tasks import toy_world as world

# Pairs (affirming word, denying word) of answers to any yes-or-no game.
LABEL_PAIRS = (
    ("yes", "no"),
    ("true", "false"),
    ("same", "other"),
    ("equivalent", "distinct"),
    ("supported", "unsupported"),
    ("paraphrase", "changed"),
    ("found", "missing"),
    ("duplicate", "different"),
    ("positive", "negative"),
    ("entailment", "contradiction"),
    ("entailment", "neutral"),
)
# Label words that a skill or game never answers with, since a target task uses them for the same
# question (boolq, rte and scitail: does it follow? mrpc and paws: do both say the same?).
_FOLLOWING = (("yes", "no"), ("true", "false"), ("supported", "unsupported"))
_SAYING_THE_SAME = (("equivalent", "distinct"), ("paraphrase", "changed"))
BARRED = {
    "follows": (*_FOLLOWING, ("entailment", "contradiction"), ("entailment", "neutral")),
    "qnli": _FOLLOWING,
    "qqp": _SAYING_THE_SAME,
    "equal": _SAYING_THE_SAME,
}
_SPLIT = "train"
_SOURCE = {task.name: task for task in suite.SOURCE_TASKS}
_BINARY = ("toy_sst2", "toy_qnli", "toy_qqp")
ALL_NOUNS = tuple(word for words in world.NOUNS.values() for word in words)


def _label_prefix(
    rng: random.Random, name: str, usual: tuple[str, str] | None = None
) -> tuple[str, tuple[str, str]]:
    """Returns the prefix of a yes-or-no task and its two answers. The prefix names the answers
    unless they are the `usual` ones."""
    if usual and rng.random() < 0.6:
        return f"{name} :", usual
    pair = rng.choice([pair for pair in LABEL_PAIRS if pair not in BARRED.get(name, ())])
    return f"{name} {pair[0]} {pair[1]} :", pair


# --- word games ------------------------------------------------------------------------------


def equal_game(rng: random.Random) -> tuple[str, str]:
    """Returns an example that asks whether two short lists of words are equal."""
    prefix, (affirm, deny) = _label_prefix(rng, "equal", ("same", "other"))
    left = rng.sample(ALL_NOUNS, rng.randint(1, 3))
    right = list(left)
    same = rng.random() < 0.5
    if not same:
        index = rng.randrange(len(left))
        if len(left) > 1 and rng.random() < 0.4:
            right[index], right[index - 1] = right[index - 1], right[index]
        else:
            right[index] = world.other(rng, ALL_NOUNS, *left)
    return f"{prefix} {' '.join(left)} | {' '.join(right)}", affirm if same else deny


def member_game(rng: random.Random) -> tuple[str, str]:
    """Returns an example that asks whether a word is in a list."""
    prefix, (affirm, deny) = _label_prefix(rng, "member", ("yes", "no"))
    words = rng.sample(ALL_NOUNS, rng.randint(2, 6))
    inside = rng.random() < 0.5
    word = rng.choice(words) if inside else world.other(rng, ALL_NOUNS, *words)
    return f"{prefix} {word} | {' '.join(words)}", affirm if inside else deny


def lookup_game(rng: random.Random) -> tuple[str, str]:
    """Returns an example that asks for the partners of some words in a list of pairs."""
    words = rng.sample(ALL_NOUNS, 2 * rng.randint(2, 5))
    pairs = list(zip(words[::2], words[1::2], strict=True))
    listing = " . ".join(f"{left} {right}" for left, right in pairs)
    asked = rng.sample(pairs, min(len(pairs), rng.choice((1, 1, 1, 2, 3))))
    query, answer = " ".join(a for a, _ in asked), " ".join(b for _, b in asked)
    if rng.random() < 0.3:
        query, answer = answer, query
    return f"lookup : {query} | {listing} .", answer


def quiz_game(rng: random.Random) -> tuple[str, str]:
    """Returns an example that asks several questions about one passage."""
    fact = world.a_fact(rng, _SPLIT)
    facts = [fact, *world.distractors(rng, _SPLIT, fact, 2)]
    asked = rng.sample(facts, 2)
    questions = " ".join(world.ask(rng, known) for known in asked)
    return f"quiz : {questions} | {world.passage(rng, facts)}", " ".join(f.value for f in asked)


def source_skill(rng: random.Random, name: str) -> tuple[str, str]:
    """Returns an example of a source task with its textual prefix.

    Yes-or-no tasks sometimes name their labels in the prefix.
    """
    task = _SOURCE[name]
    inputs, target = task.make(rng, _SPLIT)
    short = name.removeprefix("toy_")
    if name in _BINARY:
        affirm, deny = task.labels
        prefix, pair = _label_prefix(rng, short, (affirm, deny))
        return f"{prefix} {inputs}", pair[task.labels.index(target)]
    if name == "toy_mnli" and rng.random() < 0.3:
        prefix, pair = _label_prefix(rng, "follows")
        return f"{prefix} {inputs}", pair[0] if target == "entailment" else pair[1]
    return f"{short} : {inputs}", target


# --- span corruption -------------------------------------------------------------------------
# A text is (sentences to keep, sentences to corrupt). The words hidden in the second statement of a
# fact occur in its first statement, so the loss rewards attention to it.

Text = tuple[list[str], list[str]]


def _repeated_facts(rng: random.Random) -> Text:
    """Returns text that states facts, then repeats some of them in the same or other words."""
    fact = world.a_fact(rng, _SPLIT)
    facts = [fact, *world.distractors(rng, _SPLIT, fact, rng.randint(0, 2))]
    pairs = [world.restate(rng, known) for known in facts]
    again = rng.sample(pairs, min(len(pairs), rng.randint(1, 2)))
    return [first for first, _ in pairs], [rng.choice(pair) for pair in again]


def _deeds(rng: random.Random) -> Text:
    facts = [world.a_fact(rng, _SPLIT, rng.choice(world.DEEDS)) for _ in range(2)]
    pairs = [world.restate(rng, fact) for fact in facts]
    return [first for first, _ in pairs], [rng.choice(pairs)[1]]


def _reports(rng: random.Random) -> Text:
    verdict = rng.choice(tuple(suite.REPORTS))
    fact = world.a_fact(rng, _SPLIT)
    report = suite.report(rng, _SPLIT, verdict, fact)
    if verdict == "neutral":
        return [], [report, "no one knows the truth"]
    if verdict == "contradiction":
        fact = world.a_fact(rng, _SPLIT, fact.relation, fact.subject, not_values=(fact.value,))
    return [], [report, f"in truth {world.state(rng, fact)}"]


def _uses(rng: random.Random) -> Text:
    word, sense = rng.choice(tuple(suite.SENSES)), rng.randrange(2)
    return [], [suite.use_in_context(rng, _SPLIT, word, sense) for _ in range(3)]


def _opinions(rng: random.Random) -> Text:
    praise = rng.random() < 0.5
    return [], [suite.opinion(rng, _SPLIT, praise) for _ in range(3)]


def _rules(rng: random.Random) -> Text:
    thing, kind, trait = rng.choice(suite.RULES[_SPLIT])
    return [f"the {thing} is a {kind}", f"every {kind} {trait}"], [f"the {thing} {trait}"]


def _labels(rng: random.Random) -> Text:
    """Returns text that uses label words as ordinary words."""
    affirm, deny = rng.choice(LABEL_PAIRS)
    first, second = rng.sample(world.PEOPLE, 2)
    return [f"{first} said {affirm}", f"{second} said {deny}"], [
        f"{second} never said {affirm}",
        f"{first} never said {deny}",
    ]


_TEXTS = (
    (_repeated_facts, 44),
    (_deeds, 18),
    (_reports, 10),
    (_uses, 10),
    (_opinions, 4),
    (_rules, 8),
    (_labels, 6),
)


def corrupt(rng: random.Random, words: list[str], rate: float = 0.25) -> tuple[str, str]:
    """Replaces short spans with sentinels. The target lists each sentinel with its hidden words."""
    inputs: list[str] = []
    targets: list[str] = []
    index = spans = 0
    forced = rng.randrange(len(words))  # an example with nothing to predict would be wasted
    while index < len(words):
        last_chance = spans == 0 and index == forced
        if last_chance or (spans < 4 and rng.random() < rate / 1.5):
            width = rng.choice((1, 1, 2))
            inputs.append(f"<{spans}>")
            targets += [f"<{spans}>", *words[index : index + width]]
            spans += 1
            index += width
        else:
            inputs.append(words[index])
            index += 1
    return " ".join(inputs), " ".join(targets)


def span_corruption(rng: random.Random) -> tuple[str, str]:
    makers, weights = zip(*_TEXTS, strict=True)
    whole, torn = rng.choices(makers, weights)[0](rng)
    inputs, targets = corrupt(rng, " . ".join(torn).split() + ["."])
    return " . ".join([*whole, inputs]), targets


# --- the mixture -----------------------------------------------------------------------------


def _skill(name: str):
    def make(rng: random.Random) -> tuple[str, str]:
        return source_skill(rng, name)

    return make


# (maker, rate): rates are relative weights of examples.
MIXTURE = (
    (span_corruption, 20),
    (lookup_game, 10),
    (equal_game, 8),
    (member_game, 4),
    (quiz_game, 8),
    (_skill("toy_sst2"), 8),
    (_skill("toy_mnli"), 10),
    (_skill("toy_qnli"), 7),
    (_skill("toy_qqp"), 8),
    (_skill("toy_squad"), 9),
    (_skill("toy_record"), 8),
)


# Maximum number of tokens, EOS included; the few longer examples are drawn again.
LENGTHS = {"inputs": 40, "targets": 12}


def example(rng: random.Random) -> tuple[str, str]:
    """Returns a pretraining example drawn from the mixture."""
    makers, rates = zip(*MIXTURE, strict=True)
    while True:
        pair = rng.choices(makers, rates)[0](rng)
        lengths = (len(text.split()) + 1 for text in pair)
        if all(n <= limit for n, limit in zip(lengths, LENGTHS.values(), strict=True)):
            return pair
