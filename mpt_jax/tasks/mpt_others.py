"""The MPT paper's "Others": importing this module registers winogrande, yelp, scitail and paws."""

from functools import partial

from mpt_jax.tasks.splits import carved, halved, own
from mpt_jax.tasks.suite import Row, register
from mpt_jax.tasks.templates import labelled

ROWS = (
    Row(
        "winogrande",
        "winogrande:1.2.0",
        parts=carved("train_xl"),
        sizes={"train_xl": 40_398, "validation": 1_267},
        template=partial(
            labelled, {"sentence": "sentence", "option0": "option1", "option1": "option2"}
        ),
        words=("option0", "option1"),
    ),
    Row(
        "yelp",
        "yelp_polarity_reviews:0.2.0",
        parts=carved("train", "test", most=100_000),
        sizes={"train": 560_000, "test": 38_000},
        template=partial(labelled, {"sentence": "text"}),
        words=("negative", "positive"),
    ),
    Row(
        "scitail",
        "sci_tail:1.0.0",
        parts=halved(),
        sizes={"train": 23_097, "validation": 1_304},
        template=partial(labelled, {"premise": "premise", "hypothesis": "hypothesis"}),
        words=("entailment", "neutral"),
    ),
    Row(
        "paws",
        "paws_wiki/labeled_final_tokenized:1.1.0",
        parts=own(),
        sizes={"train": 49_401, "validation": 8_000, "test": 8_000},
        template=partial(labelled, {"sentence1": "sentence1", "sentence2": "sentence2"}),
        words=("different_meaning", "paraphrase"),
    ),
)

register(ROWS)
