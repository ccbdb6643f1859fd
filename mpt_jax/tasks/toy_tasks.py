"""The toy suite's examples: six source tasks and eight target tasks about the toy world.

The function of each task is a pure function `(rng, split) -> (inputs, targets)` of plain text,
modeled on the public task of the same name. Inputs have no task prefix and share one format,
`left | right`. The same input could therefore come from several tasks, and only a prompt identifies
the task. Labels are words. All facts that an input states or claims are in its split
(`toy_world.split_of`).
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

from mpt_jax.tasks import toy_world as world
from mpt_jax.tasks.toy_world import Fact

Maker = Callable[[random.Random, str], tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class ToyTask:
    """A task of the suite. `labels` is () for free text; `role` is 'source' or 'target'."""

    name: str
    make: Maker
    labels: tuple[str, ...]
    role: str


# --- scenes that several tasks share ---------------------------------------------------------


def _neighbor(rng: random.Random, split: str, fact: Fact, value: str) -> Fact:
    """Returns a fact with the same relation about another person, whose value is `value`."""
    while True:
        subject = world.other(rng, world.PEOPLE, fact.subject)
        if value in world.values(split, fact.relation, subject):
            return Fact(subject, fact.relation, value)


def _other_fact(rng: random.Random, split: str, fact: Fact) -> Fact:
    """Returns another fact about the same subject."""
    relation = rng.choice([r for r in world.RELATIONS if r != fact.relation])
    return world.a_fact(rng, split, relation, fact.subject)


def claim_scene(rng: random.Random, split: str, verdict: str) -> tuple[Fact, list[Fact]]:
    """Returns a claim and two facts that entail it, contradict it, or leave it open (`neutral`).

    The words do not give away the verdict: if the claim does not follow, its value usually still
    occurs in the facts, but about another person.
    """
    claim = world.a_fact(rng, split)
    taken = (claim.value,)
    if verdict == "neutral":
        return claim, [_neighbor(rng, split, claim, claim.value), _other_fact(rng, split, claim)]
    if verdict == "entailment":
        known = claim
        rival = world.a_fact(rng, split, claim.relation, None, (claim.subject,), taken)
    else:
        known = world.a_fact(rng, split, claim.relation, claim.subject, not_values=taken)
        rival = _neighbor(rng, split, claim, claim.value)
    if rng.random() < 0.3:
        rival = _other_fact(rng, split, claim)
    return claim, [known, rival]


def _vary(rng: random.Random, split: str, fact: Fact, parts: str) -> Fact:
    """Returns the fact with its subject, relation or value replaced with another of the same kind.

    `parts` lists the parts that may be replaced: s (subject), r (relation) and o (value).
    """
    while True:
        part = rng.choice(parts)
        if part == "s":
            return _neighbor(rng, split, fact, fact.value)
        if part == "o":
            values = (fact.value,)
            return world.a_fact(rng, split, fact.relation, fact.subject, not_values=values)
        kin = [
            relation
            for relation in world.RELATIONS + world.DEEDS
            if relation.kind == fact.relation.kind
            and relation != fact.relation
            and fact.value in world.values(split, relation, fact.subject)
        ]
        if kin:
            return Fact(fact.subject, rng.choice(kin), fact.value)


# --- source tasks ----------------------------------------------------------------------------

PRAISE = "good great lovely fine superb charming bright fresh warm clever splendid gentle".split()
BLAME = "bad awful dull poor nasty boring dirty stale cold stupid dreadful rude".split()
REVIEWED = (
    "film play song story meal show dinner concert novel speech trip party hotel garden".split()
)
_REVIEWS = (
    "the {n} was {a}",
    "{p} found the {n} {a}",
    "what a {a} {n}",
    "{p} said the {n} was {a}",
)
_REVERSED_REVIEWS = ("the {n} was not {a}", "{p} never found the {n} {a}")


def opinion(rng: random.Random, split: str, praise: bool) -> str:
    """Returns a clause of praise or blame, whose (noun, adjective) pair is in `split`."""
    turned = rng.random() < 0.3
    words = PRAISE if praise != turned else BLAME
    while True:
        noun, adjective = rng.randrange(len(REVIEWED)), rng.randrange(len(words))
        if world.assign_split(noun + 3 * adjective) == split:
            form = rng.choice(_REVERSED_REVIEWS if turned else _REVIEWS)
            return form.format(n=REVIEWED[noun], a=words[adjective], p=rng.choice(world.PEOPLE))


def sst2(rng: random.Random, split: str) -> tuple[str, str]:
    praise = rng.random() < 0.5
    clauses = [opinion(rng, split, praise) for _ in range(rng.randint(1, 2))]
    if rng.random() < 0.3:
        clauses.append(world.state(rng, world.a_fact(rng, split)))
        rng.shuffle(clauses)
    return " and ".join(clauses) + " .", "positive" if praise else "negative"


def mnli(rng: random.Random, split: str) -> tuple[str, str]:
    verdict = rng.choice(("entailment", "neutral", "contradiction"))
    claim, facts = claim_scene(rng, split, verdict)
    return f"{world.state(rng, claim)} . | {world.passage(rng, facts)}", verdict


def qnli(rng: random.Random, split: str) -> tuple[str, str]:
    holds = rng.random() < 0.5
    fact, facts = claim_scene(rng, split, "entailment" if holds else "neutral")
    return f"{world.ask(rng, fact)} | {world.passage(rng, facts)}", "found" if holds else "missing"


def _open_pair_split(one: Fact, two: Fact) -> str:
    """Returns the split of a pair of questions that contain no value and thus state no fact."""
    numbers = [
        world.PEOPLE.index(fact.subject) + 3 * world.RELATIONS.index(fact.relation)
        for fact in (one, two)
    ]
    return world.assign_split(numbers[0] + 2 * numbers[1])


def qqp(rng: random.Random, split: str) -> tuple[str, str]:
    duplicate, is_open = rng.random() < 0.5, rng.random() < 0.5
    while True:
        fact = world.a_fact(rng, split)
        second = fact if duplicate else _vary(rng, split, fact, "sr" if is_open else "sro")
        if not is_open or _open_pair_split(fact, second) == split:
            break
    forms, other_forms = (
        fact_.relation.questions if is_open else fact_.relation.checks for fact_ in (fact, second)
    )
    one, two = rng.sample(range(2), 2)
    left = forms[one].format(s=fact.subject, o=fact.value)
    right = other_forms[two].format(s=second.subject, o=second.value)
    return f"{left} | {right}", "duplicate" if duplicate else "different"


def squad(rng: random.Random, split: str) -> tuple[str, str]:
    fact = world.a_fact(rng, split)
    facts = [fact, *world.distractors(rng, split, fact, rng.randint(1, 2))]
    return f"{world.ask(rng, fact)} | {world.passage(rng, facts)}", fact.value


def record(rng: random.Random, split: str) -> tuple[str, str]:
    fact = world.a_fact(rng, split)
    taken = (fact.value,)
    rival = world.a_fact(rng, split, fact.relation, None, (fact.subject,), taken)
    facts = [fact, rival]
    if rng.random() < 0.5:
        facts.append(_other_fact(rng, split, rival))
    first, second = world.restate(rng, fact)
    query = second.replace(fact.subject, "placeholder")
    sentences = [first] + [world.state(rng, known) for known in facts[1:]]
    rng.shuffle(sentences)
    return f"{query} . | {' . '.join(sentences)} .", fact.subject


# --- target tasks ----------------------------------------------------------------------------


def boolq(rng: random.Random, split: str) -> tuple[str, str]:
    holds = rng.random() < 0.5
    claim, facts = claim_scene(rng, split, "entailment" if holds else "contradiction")
    return f"{world.check(rng, claim)} | {world.passage(rng, facts)}", "yes" if holds else "no"


REPORTS = {
    "entailment": ("knows", "sees", "proves", "remembers"),
    "neutral": ("thinks", "hopes", "guesses", "believes"),
    "contradiction": ("pretends", "lies", "imagines", "jokes"),
}


def report(rng: random.Random, split: str, verdict: str, fact: Fact) -> str:
    """Returns a person's report of the fact, whose verb shows whether it is true, open or false."""
    speaker = world.other(rng, world.PEOPLE, fact.subject)
    return f"{speaker} {rng.choice(REPORTS[verdict])} that {world.state(rng, fact)}"


def cb(rng: random.Random, split: str) -> tuple[str, str]:
    verdict = rng.choice(tuple(REPORTS))
    claim = world.a_fact(rng, split)
    claim_report = report(rng, split, verdict, claim)
    other = world.state(rng, _other_fact(rng, split, claim))
    sentences = [claim_report, other]
    rng.shuffle(sentences)
    return f"{world.state(rng, claim)} . | {' . '.join(sentences)} .", verdict


def rte(rng: random.Random, split: str) -> tuple[str, str]:
    holds = rng.random() < 0.5
    claim, facts = claim_scene(
        rng, split, "entailment" if holds else rng.choice(("contradiction", "neutral"))
    )
    sentences = [world.state(rng, fact) for fact in facts]
    rng.shuffle(sentences)
    passage = f"{' and '.join(sentences)} ."
    return f"{world.state(rng, claim)} . | {passage}", "true" if holds else "false"


def mrpc(rng: random.Random, split: str) -> tuple[str, str]:
    same = rng.random() < 0.5
    fact = world.a_fact(rng, split)
    left, right = world.restate(rng, fact)
    if not same:
        varied = _vary(rng, split, fact, "sro")
        right = world.restate(rng, varied)[1]
    return f"{left} . | {right} .", "equivalent" if same else "distinct"


# Two senses per word, four uses each; pairs of a use and a person are assigned to splits.
SENSES = {
    "bank": (
        ("{s} took money from the bank", "the bank gave {s} a loan")
        + ("{s} has gold in the bank", "the bank pays {s}"),
        ("{s} sat on the bank of the river", "the bank was wet and {s} fell")
        + ("{s} swam to the bank", "grass grows on the bank near {s}"),
    ),
    "bat": (
        ("the bat hit the ball of {s}", "{s} swings the bat")
        + ("{s} broke a wooden bat", "{s} plays with ball and bat"),
        ("the bat flew over {s}", "{s} saw a bat at night")
        + ("a bat sleeps in the cave of {s}", "{s} heard the wings of the bat"),
    ),
    "ring": (
        ("{s} wears a gold ring", "the ring on the hand of {s}")
        + ("{s} lost a silver ring", "the ring of {s} shines"),
        ("{s} heard the phone ring", "the bells ring for {s}")
        + ("{s} let the phone ring at night", "{s} made the bells ring"),
    ),
    "star": (
        ("{s} saw a star in the sky", "the star shines at night over {s}")
        + ("the star of {s} is in the sky", "{s} looked at a star at night"),
        ("{s} is the star of the film", "the star of the show met {s}")
        + ("{s} paid the star of the play", "the film made {s} a star"),
    ),
    "seal": (
        ("the seal swam near {s}", "{s} fed the seal a fish")
        + ("a wet seal looked at {s}", "{s} saw a seal in the river"),
        ("{s} broke the seal of the letter", "the letter of {s} has a seal")
        + ("the judge put a seal on it for {s}", "{s} put the seal on the letter"),
    ),
    "crane": (
        ("the crane flew over {s}", "{s} heard the wings of the crane")
        + ("a crane stood near {s} in the river", "{s} fed the crane a fish"),
        ("the crane lifts a car for {s}", "{s} drives the crane")
        + ("{s} broke the arm of the crane", "the crane lifts stones near {s}"),
    ),
}


def use_in_context(rng: random.Random, split: str, word: str, sense: int) -> str:
    """Returns a sentence that uses `word` in one of its two senses."""
    while True:
        person, use = rng.randrange(len(world.PEOPLE)), rng.randrange(4)
        if world.assign_split(person + 2 * use + sense) == split:
            return SENSES[word][sense][use].format(s=world.PEOPLE[person])


def wic(rng: random.Random, split: str) -> tuple[str, str]:
    word, same, sense = rng.choice(tuple(SENSES)), rng.random() < 0.5, rng.randrange(2)
    left = use_in_context(rng, split, word, sense)
    right = use_in_context(rng, split, word, sense if same else 1 - sense)
    return f"{word} : {left} | {right}", "same" if same else "other"


KINDS = (
    "metal tool toy gift gem machine treasure weapon "
    "vessel jewel device relic trophy souvenir puzzle statue".split()
)
TRAITS = (
    "shines breaks burns floats rusts melts spins hums "
    "bends cracks fades glows leaks rattles sinks tilts".split()
)
_MEMBERSHIPS = ("the {thing} is a {kind}", "the {thing} counts as a {kind}")
_LAWS = ("every {kind} {trait}", "any {kind} {trait}")


def rule_triples(split: str) -> list[tuple[str, str, str]]:
    """Returns the triples (thing, kind, trait) of a split.

    A membership (thing, kind) and a law (kind, trait) imply that the thing has the trait. Both are
    assigned to splits. A (thing, trait) that follows in validation or test does not follow from
    memberships and laws of training.
    """
    held_out = {(2 * number) % 8 for number in range(8) if world.assign_split(number) != "train"}
    return [
        (thing, kind, trait)
        for i, thing in enumerate(world.GOODS)
        for j, kind in enumerate(KINDS)
        for k, trait in enumerate(TRAITS)
        if world.assign_split(i + j) == split == world.assign_split(k - j)
        and (split != "train" or (i + k) % 8 not in held_out)
    ]


RULES = {split: rule_triples(split) for split in world.SPLITS}


def scitail(rng: random.Random, split: str) -> tuple[str, str]:
    """Returns an example that asks whether a trait follows; if not, one of three words differs."""
    supported = rng.random() < 0.5
    thing, kind, trait = rng.choice(RULES[split])
    stated_thing, stated_kind, stated_trait = thing, kind, trait
    if not supported:
        triples, part = RULES[split], rng.randrange(3)
        if part == 0:
            stated_thing = rng.choice([t for t, k, _ in triples if k == kind and t != thing])
        elif part == 1:
            stated_kind = rng.choice([k for t, k, _ in triples if t == thing and k != kind])
        else:
            stated_trait = rng.choice([v for _, k, v in triples if k == kind and v != trait])
    sentences = [
        rng.choice(_LAWS).format(kind=kind, trait=stated_trait),
        rng.choice(_MEMBERSHIPS).format(thing=stated_thing, kind=stated_kind),
    ]
    rng.shuffle(sentences)
    claim = f"the {thing} {trait} ."
    return f"{claim} | {' . '.join(sentences)} .", "supported" if supported else "unsupported"


def paws(rng: random.Random, split: str) -> tuple[str, str]:
    same = rng.random() < 0.5
    while True:
        fact = world.a_fact(rng, split, rng.choice(world.DEEDS))
        turned = Fact(fact.value, fact.relation, fact.subject)
        if world.split_of(turned) == split:
            break
    left, right = world.restate(rng, fact)
    if not same:
        right = world.restate(rng, turned)[1]
    return f"{left} . | {right} .", "paraphrase" if same else "changed"


_PREDICATES = {
    "home": "lives in {o}",
    "office": "works in {o}",
    "job": "is a {o}",
    "taste": "likes {o}",
    "pet": "owns a {o}",
    "ware": "sells a {o}",
    "wish": "wants a {o}",
}


def d2t(rng: random.Random, split: str) -> tuple[str, str]:
    first = world.a_fact(rng, split)
    second = _other_fact(rng, split, first)
    table = f"name : {first.subject} | " + " | ".join(
        f"{fact.relation.name} : {fact.value}" for fact in (first, second)
    )
    clauses = [_PREDICATES[fact.relation.name].format(o=fact.value) for fact in (first, second)]
    return table, f"{first.subject} {' and '.join(clauses)} ."


SOURCE_TASKS = (
    ToyTask("toy_sst2", sst2, ("positive", "negative"), "source"),
    ToyTask("toy_mnli", mnli, ("entailment", "neutral", "contradiction"), "source"),
    ToyTask("toy_qnli", qnli, ("found", "missing"), "source"),
    ToyTask("toy_qqp", qqp, ("duplicate", "different"), "source"),
    ToyTask("toy_squad", squad, (), "source"),
    ToyTask("toy_record", record, (), "source"),
)
TARGET_TASKS = (
    ToyTask("toy_boolq", boolq, ("yes", "no"), "target"),
    ToyTask("toy_cb", cb, ("entailment", "neutral", "contradiction"), "target"),
    ToyTask("toy_rte", rte, ("true", "false"), "target"),
    ToyTask("toy_mrpc", mrpc, ("equivalent", "distinct"), "target"),
    ToyTask("toy_wic", wic, ("same", "other"), "target"),
    ToyTask("toy_scitail", scitail, ("supported", "unsupported"), "target"),
    ToyTask("toy_paws", paws, ("paraphrase", "changed"), "target"),
    ToyTask("toy_d2t", d2t, (), "target"),
)
