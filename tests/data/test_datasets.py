"""Batches, positions and errors, on tiny in-memory tasks."""

import functools

import numpy as np
import pytest
import seqio
import tensorflow as tf

from mpt_jax.batching import bucketing
from mpt_jax.core.runs import Runs
from mpt_jax.data import datasets
from mpt_jax.data.datasets import DatasetConfig
from mpt_jax.data.feature_converter import PromptFeatureConverter
from mpt_jax.data.loss_batches import eval_batches
from mpt_jax.data.sampling import EqualQuotas, StochasticTasks, TaskMixture, task_mixture
from tests.fixtures import memory_tasks

SIZES = {"dat_a": 7, "dat_b": 30, "dat_c": 11}
CONVERTER = functools.partial(PromptFeatureConverter, prompt_length=2, runs=Runs(list(SIZES)))
LENGTHS = {"inputs": 6, "targets": 4}


def register(name, size):
    memory_tasks.register_numbers(
        name, lambda i: tf.strings.as_string(i % 3), {"train": size, "validation": size}
    )


@pytest.fixture(scope="module", autouse=True)
def tasks():
    for name, size in SIZES.items():
        register(name, size)
    seqio.MixtureRegistry.remove("dat_plain")
    seqio.MixtureRegistry.add("dat_plain", list(SIZES), default_rate=1.0)


def mixture(batch_size=6, seed=3):
    return TaskMixture("dat_mixture", tuple(SIZES), StochasticTasks(batch_size, seed))


def config(provider, **changes):
    arguments = dict(
        mixture_or_task_name=provider,
        task_feature_lengths=LENGTHS,
        split="train",
        batch_size=6,
        shuffle=True,
        seed=3,
    )
    return DatasetConfig(**{**arguments, **changes})


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_equal_batches(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_train_iterator_batch_is_numpy_in_batch_contract():
    (batch,) = take(datasets.train_iterator(config(mixture()), CONVERTER), 1)
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
        **{
            f"encoder_{n}": ((6, 8), np.int32) for n in ("input_tokens", "prompt_slots", "task_ids")
        },
        **{
            f"decoder_{n}": ((6, 4), np.int32)
            for n in ("input_tokens", "target_tokens", "loss_weights", "task_ids")
        },
    }
    assert all(type(x) is np.ndarray for x in batch.values())


PIPELINES = {
    "mixture": dict(provider=mixture),
    "packed": dict(provider=mixture, pack=True),
    "plain": dict(provider=lambda: "dat_plain"),
    "task": dict(provider=lambda: "dat_b"),
    "cut": dict(provider=mixture, length_buckets={"inputs": [2], "targets": [2]}),
    "by length": dict(provider=mixture, by_length=True, length_buckets={"inputs": [2]}),
}


def some(*fast, of=tuple(PIPELINES)):
    """Parameters: the names of pipelines, of which some are fast."""
    return [pytest.param(x, marks=[] if x in fast else pytest.mark.slow) for x in of]


@pytest.mark.parametrize(
    "name, step",
    [
        ("mixture", 0),
        ("mixture", 13),
        ("packed", 3),
        ("plain", 5),
        ("by length", 17),
        pytest.param("mixture", 1, marks=pytest.mark.slow),
        pytest.param("task", 2, marks=pytest.mark.slow),
        pytest.param("by length", 4, marks=pytest.mark.slow),
    ],
)
def test_train_iterator_restored_at_any_step_same_batches(name, step):
    changes = dict(PIPELINES[name])
    provider = changes.pop("provider")
    make = lambda: datasets.train_iterator(config(provider(), **changes), CONVERTER)  # noqa: E731
    first = make()
    take(first, step)
    state = first.state()
    expected = take(first, 12)
    second = make()
    second.restore(state)
    assert_equal_batches(take(second, 12), expected)
    # A position can also be restored by an iterator that has advanced.
    first.restore(state)
    assert_equal_batches(take(first, 3), expected[:3])


def test_train_iterator_mixture_position_is_small():
    iterator = datasets.train_iterator(config(mixture()), CONVERTER)
    take(iterator, 5)
    assert len(iterator.state()) < 50_000


def test_train_iterator_restore_other_configuration_raises():
    state = datasets.train_iterator(config(mixture()), CONVERTER).state()
    other = datasets.train_iterator(config(mixture(batch_size=9), batch_size=9), CONVERTER)
    with pytest.raises(ValueError, match=r"another configuration \(sampler: saved 'Stochastic.*9"):
        other.restore(state)
    with pytest.raises(ValueError, match="The data position is corrupt"):
        other.restore(state[:100])


def test_train_iterator_restore_other_lengths_names_the_setting():
    state = datasets.train_iterator(config(mixture()), CONVERTER).state()
    lengths = {"inputs": 7, "targets": 4}
    other = datasets.train_iterator(config(mixture(), task_feature_lengths=lengths), CONVERTER)
    message = (
        r"\(TASK_FEATURE_LENGTHS: saved {'inputs': 6, 'targets': 4}, "
        r"current {'inputs': 7, 'targets': 4}\)\. Restore"
    )
    with pytest.raises(ValueError, match=message):
        other.restore(state)
    packed = datasets.train_iterator(config(mixture(), pack=True), CONVERTER)
    with pytest.raises(ValueError, match=r"PACK_LENGTHS \(or, if None, TASK_FEATURE_LENGTHS\)"):
        packed.restore(state)


def shares(name, hosts):
    """Returns the iterators of all hosts for one of the pipelines."""
    changes = dict(PIPELINES[name])
    cfg = config(changes.pop("provider")(), **changes)
    return [
        datasets.train_iterator(cfg, CONVERTER, num_hosts=hosts, host_index=i) for i in range(hosts)
    ]


def joined(iterators, count):
    """Global batches of hosts."""
    steps = zip(*(take(iterator, count) for iterator in iterators), strict=True)
    return [{n: np.concatenate([part[n] for part in parts]) for n in parts[0]} for parts in steps]


@pytest.mark.parametrize("name", some("packed"))
def test_train_iterator_any_number_of_hosts_same_batches(name):
    found = shares(name, 3)
    (rows,) = {len(x) for x in take(found[0], 1)[0].values()}
    assert rows == 2, "each host has only its own rows"
    joined(found[1:], 1)
    (whole,) = shares(name, 1)
    take(whole, 1)
    assert_equal_batches(joined(found, 4), take(whole, 4))


@pytest.mark.parametrize("name", some("by length", of=("mixture", "plain", "by length")))
def test_train_iterator_position_restores_on_any_number_of_hosts(name):
    coming = iter(joined(shares(name, 1), 4))
    hosts = shares(name, 3)
    assert_equal_batches(joined(hosts, 2), [next(coming), next(coming)])
    for number in (2, 1):  # resumes from a position that another number of hosts saved
        position = hosts[-1].state()
        hosts = shares(name, number)
        for iterator in hosts:
            iterator.restore(position)
        assert_equal_batches(joined(hosts, 1), [next(coming)])


def texts(batch):
    """The task and the text of each row."""
    tokens = [row[row > 1].tolist() for row in batch["encoder_input_tokens"]]
    return list(zip(batch["encoder_task_ids"][:, 0].tolist(), map(tuple, tokens), strict=True))


def test_by_length_window_has_same_examples_sorted():
    count = bucketing.WINDOW
    plain = take(datasets.train_iterator(config(mixture()), CONVERTER), 2 * count)
    cut = take(datasets.train_iterator(config(**buckets_of(mixture())), CONVERTER), 2 * count)
    for first in (0, count):
        expected = [text for batch in plain[first : first + count] for text in texts(batch)]
        found = [text for batch in cut[first : first + count] for text in texts(batch)]
        assert sorted(found) == sorted(expected) and found != expected
    # Ten of a hundred numbers have one digit, so a batch has texts of similar length.
    widths = [batch["encoder_input_tokens"].shape[1] for batch in cut]
    assert set(widths) == {4, 8}
    lengths = [[len(text) for _, text in texts(batch)] for batch in cut]
    mixed = [found for found in lengths if len(set(found)) > 1]
    assert len(mixed) <= 2, "one batch of a window may hold both lengths"
    assert widths[:count] != sorted(widths[:count]), "batches of a window are shuffled"


def buckets_of(provider, **changes):
    buckets = {"inputs": [2], "targets": [2]}
    return dict(provider=provider, by_length=True, length_buckets=buckets, **changes)


def test_length_buckets_trim_only_padding():
    whole = take(datasets.train_iterator(config(mixture(), length_buckets={}), CONVERTER), 20)
    cfg = config(mixture(), length_buckets={"inputs": [2], "targets": [2]})
    cut = take(datasets.train_iterator(cfg, CONVERTER), 20)
    widths = {batch["encoder_input_tokens"].shape[1] for batch in cut}
    assert widths <= {4, 8} and {b["decoder_target_tokens"].shape[1] for b in cut} == {2}
    for one, other in zip(cut, whole, strict=True):
        for name, value in other.items():
            width = one[name].shape[1]
            np.testing.assert_array_equal(one[name], value[:, :width])
            assert not value[:, width:].any() or name == "decoder_input_tokens"


def test_automatic_buckets_match_table():
    assert bucketing.automatic({"inputs": 256, "targets": 128}) == {
        "inputs": [64, 128, 192],
        "targets": [8, 16, 32, 64],
    }
    assert bucketing.automatic({"inputs": 127, "targets": 15}) == {}


def test_by_length_grouped_run_same_batches_as_solo():
    names = tuple(SIZES)
    together = TaskMixture("dat_quotas", names, EqualQuotas(6, 3))
    grouped = take(datasets.train_iterator(config(**buckets_of(together)), CONVERTER), 20)
    for row, name in enumerate(names):
        solo = TaskMixture(f"dat_quotas_{name}", (name,), EqualQuotas(2, 3))
        cfg = config(**buckets_of(solo, batch_size=2))
        for batch, whole in zip(
            take(datasets.train_iterator(cfg, CONVERTER), 20), grouped, strict=True
        ):
            assert texts(batch) == texts(whole)[2 * row : 2 * row + 2]


@pytest.mark.parametrize(
    "buckets, message",
    [
        (
            {"inputs": [2, 6]},
            r"length_buckets\['inputs'\] must increase and stay below .* 6 tokens",
        ),
        ({"targets": [3, 2]}, r"length_buckets\['targets'\] must increase"),
        ({"outputs": [3]}, "length_buckets has unknown features: 'outputs'"),
    ],
)
def test_length_buckets_invalid_raise(buckets, message):
    with pytest.raises(ValueError, match=message):
        datasets.train_iterator(config(mixture(), length_buckets=buckets), CONVERTER)


def test_dataset_config_packing_with_buckets_raises():
    with pytest.raises(
        ValueError, match="length_buckets and by_length have no effect with pack = True"
    ):
        config(mixture(), pack=True, by_length=True)


def test_train_iterator_packed_independent_runs_raise():
    apart = functools.partial(CONVERTER, runs=Runs(list(SIZES), groups="independent"))
    with pytest.raises(ValueError, match="gives the 3 groups of this job uneven shares"):
        datasets.train_iterator(config(mixture(), pack=True), apart)
    cfg = config("dat_b", pack=True, split="validation", shuffle=False)
    assert list(eval_batches(cfg, apart)["dat_b"]()), "a loss does not depend on shares"


def test_eval_batches_length_buckets_every_example_once():
    arguments = dict(split="validation", shuffle=False, batch_size=4)
    cfg = config("dat_b", length_buckets={"inputs": [2]}, **arguments)
    batches = list(eval_batches(cfg, CONVERTER)["dat_b"]())
    expected = eval_batches(config("dat_b", **arguments), CONVERTER)["dat_b"]()
    wanted = [text for batch in expected for text in texts(batch) if text[1]]
    assert sorted(t for batch in batches for t in texts(batch) if t[1]) == sorted(wanted)
    assert [batch["encoder_input_tokens"].shape[1] for batch in batches] == [4] * 2 + [8] * 6


def test_eval_batches_mixture_every_example_once():
    made = eval_batches(
        config("dat_plain", split="validation", shuffle=False, batch_size=4), CONVERTER
    )
    assert list(made) == ["dat_a", "dat_b", "dat_c", "dat_plain"]
    batches = list(made["dat_a"]())
    assert [b["encoder_input_tokens"].shape for b in batches] == [(4, 8), (4, 8)]
    assert batches[1]["decoder_loss_weights"].sum(axis=1).tolist() == [2, 2, 2, 0]
    assert not any(x[3].any() for x in batches[1].values())
    digits = np.concatenate([b["encoder_input_tokens"][:, 2] for b in batches]) - 3 - ord("0")
    assert digits[:7].tolist() == list(range(7))
    assert len(list(made["dat_plain"]())) == 2 + 8 + 3
    assert_equal_batches(list(made["dat_a"]()), batches)


@pytest.mark.parametrize(
    ("batch_size", "buckets"),
    [
        (3, {}),
        (1, {"inputs": [4]}),
        pytest.param(1, {}, marks=pytest.mark.slow),
        pytest.param(3, {"inputs": [4]}, marks=pytest.mark.slow),
    ],
)
def test_eval_batches_kept_equal_those_of_each_task(batch_size, buckets):
    """With one row a batch, tasks are longer than a window of batches and start inside one."""
    arguments = dict(split="validation", shuffle=False, batch_size=batch_size)
    kept, separate = (
        eval_batches(
            config("dat_plain", **arguments, length_buckets=buckets, use_memory_cache=keep),
            CONVERTER,
        )
        for keep in (True, False)
    )
    assert max(SIZES.values()) > bucketing.WINDOW and list(kept) == list(separate)
    for name in kept:
        assert_equal_batches(list(kept[name]()), list(separate[name]()))


def test_eval_batches_limited_and_sharded_equal_whole():
    cfg = config("dat_b", split="validation", shuffle=False, batch_size=4)
    whole = list(eval_batches(cfg, CONVERTER, num_batches=2)["dat_b"]())
    assert len(whole) == 2
    halves = [
        list(eval_batches(cfg, CONVERTER, num_batches=2, num_hosts=2, host_index=i)["dat_b"]())
        for i in range(2)
    ]
    for step in range(2):
        assert_equal_batches(
            [{n: np.concatenate([h[step][n] for h in halves]) for n in whole[step]}], [whole[step]]
        )


@pytest.mark.parametrize(
    "cfg, message",
    [
        (lambda: config("dat_bb"), r"Unknown task or mixture 'dat_bb'. Did you mean 'dat_b'"),
        (lambda: config("dat_a", seed=None), "seed is None, but training needs a seed"),
        (lambda: config("dat_a", split="test"), "'dat_a' has no 'test' split; it has train, valid"),
        (lambda: config("dat_plain", split="test"), "No task of mixture 'dat_plain' has a 'test'"),
        (lambda: config(mixture(), batch_size=9), r"batch_size is 9, but \w+.batch_size is 6"),
        (lambda: config("dat_a", batch_size=0), "batch_size must be positive, got 0"),
        (lambda: config("dat_a", task_feature_lengths=None), "task_feature_lengths is None, but"),
        (
            lambda: config("dat_a", module="tasks.no_such_suite"),
            r"The task suite tasks.no_such_suite cannot be imported \(no module tasks",
        ),
        (
            lambda: config(mixture(), task_feature_lengths={"inputs": 2, "targets": 4}),
            r"\(dat_b: 20 of 30 \(66.67%\), dat_c: 1 of 11 \(9.09%\)\). Raise the limits",
        ),
    ],
)
def test_train_iterator_invalid_config_raises(cfg, message):
    with pytest.raises(ValueError, match=message):
        datasets.train_iterator(cfg(), CONVERTER)


def test_train_iterator_indivisible_batch_raises():
    with pytest.raises(ValueError, match=r"number of hosts \(4\), got 6. Use 4, for"):
        datasets.train_iterator(config("dat_a"), CONVERTER, num_hosts=4)


def test_train_iterator_unknown_run_raises_before_first_batch():
    converter = functools.partial(PromptFeatureConverter, prompt_length=2, runs=Runs(["dat_a"]))
    with pytest.raises(ValueError, match="Unknown run 'dat_b'. Did you mean 'dat_a'"):
        datasets.train_iterator(config("dat_b"), converter)


def test_datasets_empty_split_raises():
    register("dat_empty", 0)
    converter = functools.partial(PromptFeatureConverter, prompt_length=2, runs=Runs(["dat_empty"]))
    with pytest.raises(ValueError, match="The 'train' split of task 'dat_empty' is empty"):
        name = task_mixture(["dat_empty"], EqualQuotas(6, 3))
        datasets.train_iterator(config(name), converter)
    with pytest.raises(ValueError, match="does not fill one batch"):
        next(datasets.train_iterator(config("dat_empty"), converter))
    with pytest.raises(ValueError, match="The 'train' split of task 'dat_empty' is empty"):
        eval_batches(config("dat_empty"), converter)


def test_train_iterator_graph_error_is_readable():
    cfg = config("dat_b", task_feature_lengths={"inputs": 2, "targets": 4}, shuffle=False)
    iterator = datasets.train_iterator(cfg, CONVERTER)
    with pytest.raises(ValueError, match=r"^An example of dat_b is longer than task_feature_leng"):
        take(iterator, 3)
    truncating = functools.partial(CONVERTER, on_overlong="truncate")
    assert take(datasets.train_iterator(cfg, truncating), 3)
