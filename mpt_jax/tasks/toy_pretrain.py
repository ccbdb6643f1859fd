"""What the tiny backbone reads before any prompt is tuned: text of the world and source skills.

As T5 1.0 was, it is pretrained on span corruption together with supervised tasks under textual
prefixes. The supervised tasks are the six source skills and four small word games; target tasks
never appear. Two things make matching across sentences emerge in a small network:

* the word games and span corruption over facts told twice give the lookup that all the skills
  rest on a simpler form, many times per example (a curriculum by mixing);
* label words are named in the prefix (`game yes no :`), so that every label word of the suite is
  often a target, with several games and source skills. A skill is never asked to answer with the
  words of a target task that puts the same question.

All examples are drawn from the train split of the world and written as lists of words; a sentinel
is the word `<i>`.
"""

from __future__ import annotations

import random

from mpt_jax.tasks import toy_tasks as suite
from mpt_jax.tasks import toy_world as world

# Pairs (affirming word, denying word) that any yes-or-no game may be asked to answer with.
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
# Words that a skill or game never answers with: a target task asks the same of other inputs with
# them (boolq, rte and scitail whether something follows, mrpc and paws whether two say the same).
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
    """The prefix of a yes-or-no task and its two answers; other answers are named in it."""
    if usual and rng.random() < 0.6:
        return f"{name} :", usual
    pair = rng.choice([pair for pair in LABEL_PAIRS if pair not in BARRED.get(name, ())])
    return f"{name} {pair[0]} {pair[1]} :", pair


# --- word games ------------------------------------------------------------------------------


def equal_game(rng: random.Random) -> tuple[str, str]:
    """Are two short lists of words the same list?"""
    prefix, (affirm, deny) = _label_prefix(rng, "equal", ("same", "other"))
    left = rng.sample(ALL_NOUNS, rng.randint(1, 3))
    right = list(left)
    same = rng.random() < 0.5
    if not same:
        place = rng.randrange(len(left))
        if len(left) > 1 and rng.random() < 0.4:
            right[place], right[place - 1] = right[place - 1], right[place]
        else:
            right[place] = world.other(rng, ALL_NOUNS, *left)
    return f"{prefix} {' '.join(left)} | {' '.join(right)}", affirm if same else deny


def member_game(rng: random.Random) -> tuple[str, str]:
    """Is a word in a list?"""
    prefix, (affirm, deny) = _label_prefix(rng, "member", ("yes", "no"))
    words = rng.sample(ALL_NOUNS, rng.randint(2, 6))
    inside = rng.random() < 0.5
    word = rng.choice(words) if inside else world.other(rng, ALL_NOUNS, *words)
    return f"{prefix} {word} | {' '.join(words)}", affirm if inside else deny


def lookup_game(rng: random.Random) -> tuple[str, str]:
    """What stands beside each of these words in a list of pairs?"""
    words = rng.sample(ALL_NOUNS, 2 * rng.randint(2, 5))
    pairs = list(zip(words[::2], words[1::2], strict=True))
    told = " . ".join(f"{left} {right}" for left, right in pairs)
    asked = rng.sample(pairs, min(len(pairs), rng.choice((1, 1, 1, 2, 3))))
    query, answer = " ".join(a for a, _ in asked), " ".join(b for _, b in asked)
    if rng.random() < 0.3:
        query, answer = answer, query
    return f"lookup : {query} | {told} .", answer


def quiz_game(rng: random.Random) -> tuple[str, str]:
    """Several questions about one passage."""
    fact = world.a_fact(rng, _SPLIT)
    facts = [fact, *world.distractors(rng, _SPLIT, fact, 2)]
    asked = rng.sample(facts, 2)
    questions = " ".join(world.ask(rng, known) for known in asked)
    return f"quiz : {questions} | {world.passage(rng, facts)}", " ".join(f.value for f in asked)


def source_skill(rng: random.Random, name: str) -> tuple[str, str]:
    """A source task under its textual prefix; yes-or-no ones sometimes name their labels."""
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
# A text is (sentences that stay whole, sentences to corrupt): what is hidden from a fact's second
# telling can be found in the first, so the loss rewards looking.

Text = tuple[list[str], list[str]]


def _told_twice(rng: random.Random) -> Text:
    """Facts and, after them, some of the facts again, in the same or in other words."""
    fact = world.a_fact(rng, _SPLIT)
    facts = [fact, *world.distractors(rng, _SPLIT, fact, rng.randint(0, 2))]
    told = [world.restate(rng, known) for known in facts]
    again = rng.sample(told, min(len(told), rng.randint(1, 2)))
    return [first for first, _ in told], [rng.choice(both) for both in again]


def _deeds(rng: random.Random) -> Text:
    facts = [world.a_fact(rng, _SPLIT, rng.choice(world.DEEDS)) for _ in range(2)]
    told = [world.restate(rng, fact) for fact in facts]
    return [first for first, _ in told], [rng.choice(told)[1]]


def _reports(rng: random.Random) -> Text:
    verdict = rng.choice(tuple(suite.REPORTS))
    fact = world.a_fact(rng, _SPLIT)
    said = suite.report(rng, _SPLIT, verdict, fact)
    if verdict == "neutral":
        return [], [said, "no one knows the truth"]
    if verdict == "contradiction":
        fact = world.a_fact(rng, _SPLIT, fact.relation, fact.subject, not_values=(fact.value,))
    return [], [said, f"in truth {world.state(rng, fact)}"]


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
    """Sentences that use label words as ordinary words."""
    affirm, deny = rng.choice(LABEL_PAIRS)
    first, second = rng.sample(world.PEOPLE, 2)
    return [f"{first} said {affirm}", f"{second} said {deny}"], [
        f"{second} never said {affirm}",
        f"{first} never said {deny}",
    ]


_TEXTS = (
    (_told_twice, 44),
    (_deeds, 18),
    (_reports, 10),
    (_uses, 10),
    (_opinions, 4),
    (_rules, 8),
    (_labels, 6),
)


def corrupt(rng: random.Random, words: list[str], rate: float = 0.25) -> tuple[str, str]:
    """Replace short spans by sentinels; the target lists each sentinel and what it hid."""
    inputs: list[str] = []
    targets: list[str] = []
    place = spans = 0
    forced = rng.randrange(len(words))  # an example with nothing to predict would be wasted
    while place < len(words):
        last_chance = spans == 0 and place == forced
        if last_chance or (spans < 4 and rng.random() < rate / 1.5):
            width = rng.choice((1, 1, 2))
            inputs.append(f"<{spans}>")
            targets += [f"<{spans}>", *words[place : place + width]]
            spans += 1
            place += width
        else:
            inputs.append(words[place])
            place += 1
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


# (maker, rate): rates are relative numbers of examples.
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


# Tokens of the longest example, EOS included; the few that are longer are drawn again.
LENGTHS = {"inputs": 40, "targets": 12}


def example(rng: random.Random) -> tuple[str, str]:
    """One pretraining example drawn from the mixture."""
    makers, rates = zip(*MIXTURE, strict=True)
    while True:
        pair = rng.choices(makers, rates)[0](rng)
        lengths = (len(text.split()) + 1 for text in pair)
        if all(n <= limit for n, limit in zip(lengths, LENGTHS.values(), strict=True)):
            return pair
