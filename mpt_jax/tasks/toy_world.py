"""A small generated world: people, the facts about them, and sentences that state those facts.

Everything here is a pure function of a `random.Random`; there are no files. A *fact* is a triple
(subject, relation, value). Each relation is functional: a person has one home, one job, one
favorite food. Several sentences state the same fact, which makes paraphrases possible.

Splits share words but not facts: `split_of` assigns every possible triple to train, validation or
test, and a scene of one split states only facts of that split. So memorized training facts cannot
answer a held-out example; the model has to read it.
"""

from __future__ import annotations

import dataclasses
import random

SPLITS = ("train", "validation", "test")

PEOPLE = tuple(
    "anna ben carla david emma felix greta hugo irene jack kate leo "
    "maria nina oscar paul rosa simon tina victor wanda yara zoe max".split()
)
CITIES = tuple(
    "paris rome berlin madrid london oslo vienna prague "
    "lisbon athens dublin cairo tokyo delhi lima boston".split()
)
JOBS = tuple(
    "baker doctor teacher farmer painter singer writer lawyer "
    "nurse sailor pilot tailor judge dancer waiter barber".split()
)
FOODS = tuple(
    "tea coffee rice bread cheese honey soup milk "
    "salt sugar wine fruit fish pasta cake butter".split()
)
PETS = tuple(
    "dog cat horse goat sheep cow duck hen "
    "fox rabbit pony parrot turtle lizard hamster donkey".split()
)
GOODS = tuple(
    "book lamp chair coat hat clock boat car "
    "bike table mirror piano phone carpet knife basket".split()
)
NOUNS = {
    "person": PEOPLE,
    "city": CITIES,
    "job": JOBS,
    "food": FOODS,
    "pet": PETS,
    "good": GOODS,
}


@dataclasses.dataclass(frozen=True)
class Relation:
    """One functional relation and its sentences; `{s}` is the subject, `{o}` the value."""

    name: str
    kind: str
    statements: tuple[str, ...]
    questions: tuple[str, ...] = ()
    checks: tuple[str, ...] = ()


RELATIONS = (
    Relation(
        "home",
        "city",
        ("{s} lives in {o}", "{s} has a home in {o}", "the home of {s} is in {o}"),
        ("where does {s} live ?", "in which city is the home of {s} ?"),
        ("does {s} live in {o} ?", "is the home of {s} in {o} ?"),
    ),
    Relation(
        "office",
        "city",
        ("{s} works in {o}", "{s} has an office in {o}", "the office of {s} is in {o}"),
        ("where does {s} work ?", "in which city is the office of {s} ?"),
        ("does {s} work in {o} ?", "is the office of {s} in {o} ?"),
    ),
    Relation(
        "job",
        "job",
        ("{s} is a {o}", "{s} earns money as a {o}", "the job of {s} is {o}"),
        ("what is the job of {s} ?", "how does {s} earn money ?"),
        ("is {s} a {o} ?", "does {s} earn money as a {o} ?"),
    ),
    Relation(
        "taste",
        "food",
        ("{s} likes {o}", "{s} is fond of {o}", "{o} is the favourite food of {s}"),
        ("what does {s} like ?", "what is the favourite food of {s} ?"),
        ("does {s} like {o} ?", "is {s} fond of {o} ?"),
    ),
    Relation(
        "pet",
        "pet",
        ("{s} owns a {o}", "{s} keeps a {o}", "the {o} belongs to {s}"),
        ("what does {s} own ?", "which animal belongs to {s} ?"),
        ("does {s} own a {o} ?", "does the {o} belong to {s} ?"),
    ),
    Relation(
        "ware",
        "good",
        ("{s} sells a {o}", "{s} offers a {o}", "the {o} is sold by {s}"),
        ("what does {s} sell ?", "what is sold by {s} ?"),
        ("does {s} sell a {o} ?", "is the {o} sold by {s} ?"),
    ),
    Relation(
        "wish",
        "good",
        ("{s} wants a {o}", "{s} dreams of a {o}", "the {o} is the wish of {s}"),
        ("what does {s} want ?", "what is the wish of {s} ?"),
        ("does {s} want a {o} ?", "is the {o} the wish of {s} ?"),
    ),
)

DEEDS = (
    Relation(
        "help",
        "person",
        ("{s} helps {o}", "{o} is helped by {s}", "{o} gets help from {s}"),
    ),
    Relation(
        "lesson",
        "person",
        ("{s} teaches {o}", "{o} is taught by {s}", "{o} learns from {s}"),
    ),
    Relation(
        "call",
        "person",
        ("{s} calls {o}", "{o} is called by {s}", "{o} gets a call from {s}"),
    ),
    Relation(
        "visit",
        "person",
        ("{s} visits {o}", "{o} is visited by {s}", "{o} gets a visit from {s}"),
    ),
)

_ORDER = {relation: index for index, relation in enumerate(RELATIONS + DEEDS)}
_PERSON_INDEX = {name: index for index, name in enumerate(PEOPLE)}
_VALUE_INDEX = {
    kind: {word: index for index, word in enumerate(words)} for kind, words in NOUNS.items()
}


def assign_split(place: int) -> str:
    """Returns the split of item number `place` of an enumeration: six of eight are for training."""
    return {6: "validation", 7: "test"}.get(place % 8, "train")


@dataclasses.dataclass(frozen=True)
class Fact:
    """One triple; `value` is a word of `relation.kind`."""

    subject: str
    relation: Relation
    value: str


def split_of(fact: Fact) -> str:
    """Returns the split of a fact; every possible triple is in exactly one split.

    A person has equally many possible values of a relation in validation and in test.
    """
    return assign_split(
        _PERSON_INDEX[fact.subject]
        + 3 * _ORDER[fact.relation]
        + _VALUE_INDEX[fact.relation.kind][fact.value]
    )


def _possible_values() -> dict[tuple[str, str, str], tuple[str, ...]]:
    table: dict[tuple[str, str, str], list[str]] = {}
    for relation in RELATIONS + DEEDS:
        for subject in PEOPLE:
            for split in SPLITS:
                table[split, relation.name, subject] = []
            for value in NOUNS[relation.kind]:
                if value != subject:
                    split = split_of(Fact(subject, relation, value))
                    table[split, relation.name, subject].append(value)
    return {key: tuple(values) for key, values in table.items()}


_VALUES = _possible_values()


def values(split: str, relation: Relation, subject: str) -> tuple[str, ...]:
    """Returns the possible values of `relation` for `subject` in `split`."""
    return _VALUES[split, relation.name, subject]


def other(rng: random.Random, words: tuple[str, ...], *taken: str) -> str:
    """Returns a random word of `words` that is not in `taken`."""
    while True:
        word = rng.choice(words)
        if word not in taken:
            return word


def a_fact(
    rng: random.Random,
    split: str,
    relation: Relation | None = None,
    subject: str | None = None,
    not_subjects: tuple[str, ...] = (),
    not_values: tuple[str, ...] = (),
) -> Fact:
    """Returns a random fact of `split`; draws the relation, subject and value unless given."""
    relation = relation or rng.choice(RELATIONS)
    while True:
        who = subject or other(rng, PEOPLE, *not_subjects)
        choices = [word for word in values(split, relation, who) if word not in not_values]
        if choices:
            return Fact(who, relation, rng.choice(choices))
        if subject:
            raise ValueError(
                f"{subject} has no value of {relation.name!r} in {split!r} except {not_values}. "
                "Exclude fewer values."
            )


def state(rng: random.Random, fact: Fact, form: int | None = None) -> str:
    """Returns a sentence (no full stop) that states the fact."""
    forms = fact.relation.statements
    return forms[rng.randrange(len(forms)) if form is None else form].format(
        s=fact.subject, o=fact.value
    )


def restate(rng: random.Random, fact: Fact) -> tuple[str, str]:
    """Returns two different sentences that state the same fact."""
    first, second = rng.sample(fact.relation.statements, 2)
    return (
        first.format(s=fact.subject, o=fact.value),
        second.format(s=fact.subject, o=fact.value),
    )


def ask(rng: random.Random, fact: Fact) -> str:
    """Returns a question whose answer is the fact's value."""
    return rng.choice(fact.relation.questions).format(s=fact.subject)


def check(rng: random.Random, fact: Fact) -> str:
    """Returns a yes-or-no question about whether the fact holds."""
    return rng.choice(fact.relation.checks).format(s=fact.subject, o=fact.value)


def distractors(rng: random.Random, split: str, fact: Fact, count: int = 2) -> list[Fact]:
    """Returns facts that share words with `fact` but do not answer a question about it.

    The first has the same relation and another subject, the second the same subject and another
    relation; further ones are random. None has `fact`'s subject together with `fact`'s relation.
    """
    others: list[Fact] = []
    for index in range(count):
        taken = tuple(known.value for known in others) + (fact.value,)
        if index == 0:
            names = (fact.subject,)
            others.append(a_fact(rng, split, fact.relation, None, names, taken))
        elif index == 1:
            relation = rng.choice([r for r in RELATIONS if r != fact.relation])
            others.append(a_fact(rng, split, relation, fact.subject, not_values=taken[:1]))
        else:
            names = (fact.subject, others[0].subject)
            others.append(a_fact(rng, split, None, None, names, taken))
    return others


def passage(rng: random.Random, facts: list[Fact]) -> str:
    """Returns the facts in random order, one sentence each."""
    shuffled = rng.sample(facts, len(facts))
    return " . ".join(state(rng, fact) for fact in shuffled) + " ."
