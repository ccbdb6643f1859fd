"""Draws against a NumPy re-derivation, quotas, passes and hosts."""

import itertools
import logging
import zlib

import numpy as np
import pytest
import seqio
import tensorflow as tf

from mpt_jax.data import feature_converter, preprocessors, sampling
from mpt_jax.data.sampling import (
    EqualQuotas,
    PerExample,
    Sampler,
    StochasticTasks,
    TaskMixture,
)
from tests.fixtures import memory_tasks
from tests.fixtures.gin_files import JOINT, TARGET, VOCABULARY, parse, value

WEIGHTS = np.array([0.285, 0.285, 0.113, 0.072, 0.094, 0.151])
SIZES = {"smp_a": 5, "smp_b": 40, "smp_c": 13}


# --- An independent derivation of the random bits: Philox 4x32-10, as published ---------------


def philox(counter, key):
    """Ten rounds of Philox on four 32-bit words (Salmon et al. 2011)."""
    c, k = [int(x) for x in counter], [int(x) for x in key]
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def random_words(seed, count):
    """The first `count` 32-bit words that TensorFlow's stateless generator makes of a seed."""
    first, second = (int(s) % 2**64 for s in seed)
    words = [first % 2**32, first >> 32, second % 2**32, second >> 32]
    # The seed itself is the counter of one scrambling call under a fixed key.
    mixed = philox(words, [0x3EC8F720, 0x02461E29])
    found = []
    for block in range(-(-count // 4)):
        found += philox([block, 0, mixed[2], mixed[3]], mixed[:2])
    return found[:count]


def uniforms(seed, step, count):
    stream = zlib.crc32(b"mpt_jax.sampling") & 0x7FFFFFFF
    words = random_words([(seed << 32) | stream, step], 2 * count)
    # 52 bits of mantissa: 20 of the first word, all of the second.
    bits = [((words[2 * i] & 0xFFFFF) << 32) | words[2 * i + 1] for i in range(count)]
    return np.array(bits) / 2**52


def test_sampler_uniform_draws_match_philox_reference():
    for seed, step in [(0, 0), (7, 3), (2**31 - 1, 10**9)]:
        found = EqualQuotas(8, seed)._uniform(np.array([step]), 7)
        np.testing.assert_array_equal(found[0], uniforms(seed, step, 7))


def stochastic_reference(step, seed, batch, weights, kappa, replacement):
    size = max(kappa, len(weights))
    u = uniforms(seed, step, 2 + size)
    k = 2 + int(u[0] * (kappa - 1))
    quotas = np.full(k, batch // k)
    if replacement:
        cdf = np.cumsum(weights) / np.sum(weights)
        tasks = np.array([np.sum(cdf[:-1] <= x) for x in u[2 : 2 + k]])
        quotas[int(u[1] * k)] += batch % k
    else:
        gumbel = -np.log(-np.log(u[2 : 2 + len(weights)]))
        tasks = np.argsort(-(np.log(weights) + gumbel))[:k]
        quotas[: batch % k] += 1
    return np.repeat(tasks, quotas)


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("kappa", [2, 4, 6])
def test_stochastic_tasks_draws_match_reference(kappa, replacement):
    sampler = StochasticTasks(32, seed=11, kappa=kappa, replacement=replacement)
    for step, found in enumerate(sampler.draw(np.arange(40), WEIGHTS)):
        expected = stochastic_reference(step, 11, 32, WEIGHTS, kappa, replacement)
        np.testing.assert_array_equal(found, expected)
        distinct = len(set(found))
        assert distinct <= kappa and (replacement or distinct >= 2)


def test_stochastic_tasks_task_count_uniform_shares_by_weight():
    sampler = StochasticTasks(30, seed=3)
    batches = sampler.draw(np.arange(2000), WEIGHTS)
    counts = np.bincount([len(set(batch)) for batch in batches], minlength=7)
    # 400 expected each; five standard deviations of a binomial count are 89.
    assert counts[:2].sum() == 0 and np.abs(counts[2:] - 400).max() < 89
    share = np.bincount(np.concatenate(batches)) / 60000
    assert (np.argsort(-share)[:2] < 2).all() and np.argmin(share) == 3


def test_per_example_draws_match_reference():
    sampler = PerExample(1000, seed=5)
    (found,) = sampler.draw(np.array([9]), WEIGHTS)
    cdf = np.cumsum(WEIGHTS) / WEIGHTS.sum()
    expected = [np.sum(cdf[:-1] <= x) for x in uniforms(5, 9, 1000)]
    np.testing.assert_array_equal(found, expected)


# --- Mixtures --------------------------------------------------------------------------------


def register(name, size):
    memory_tasks.register_numbers(name, lambda i: tf.constant("t"), {"train": size})


@pytest.fixture(scope="module", autouse=True)
def tasks():
    for name, size in SIZES.items():
        register(name, size)


def stream(sampler, count, hosts=1, host=0, names=tuple(SIZES), **arguments):
    """The first `count` examples of a host, as (task, number of the example)."""
    dataset = TaskMixture("m", names, sampler).get_dataset(
        {"inputs": 8, "targets": 2},
        shard_info=seqio.ShardInfo(index=host, num_shards=hosts),
        **arguments,
    )
    name_of = {preprocessors.task_id(name): name for name in names}
    return [
        (name_of[row["task_ids"][0]], int(bytes((row["inputs"][:-1] - 3).tolist())))
        for row in dataset.take(count).as_numpy_iterator()
    ]


SAMPLERS = [
    StochasticTasks(12, seed=1, kappa=3),
    StochasticTasks(12, seed=1, kappa=3, replacement=True),
    PerExample(12, seed=1),
    EqualQuotas(12, seed=1),
]
# With replacement, the same code distributes the draws.
MOST = [
    pytest.param(each, marks=pytest.mark.slow) if number in (1, 2) else each
    for number, each in enumerate(SAMPLERS)
]


@pytest.mark.parametrize("sampler", MOST, ids=lambda s: type(s).__name__)
def test_sampler_host_shards_make_up_global_batch(sampler):
    steps, batch = 6, sampler.batch_size
    alone = stream(sampler, steps * batch)
    for hosts in (2, 4) if sampler is SAMPLERS[0] else (3,):
        shares = [stream(sampler, steps * batch // hosts, hosts, h) for h in range(hosts)]
        share = batch // hosts
        for step in range(steps):
            dealt = sum((s[step * share : (step + 1) * share] for s in shares), [])
            assert sorted(dealt) == sorted(alone[step * batch : (step + 1) * batch])


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
def test_task_mixture_each_pass_is_a_permutation(sampler):
    rows = stream(sampler, 600)
    orders = set()
    for name, size in SIZES.items():
        numbers = [number for task, number in rows if task == name]
        passes = [numbers[i : i + size] for i in range(0, len(numbers) - size + 1, size)]
        assert len(passes) >= 2
        for one in passes:
            assert sorted(one) == list(range(size))
        orders |= {tuple(one) for one in passes if size > 5}
    assert len(orders) > 2  # and not the same permutation each time


def test_task_mixture_permutation_matches_reference():
    found = [number for _, number in stream(EqualQuotas(1, seed=4), 26, names=("smp_c",))]
    for number in range(2):
        words = random_words([(4 << 32) | preprocessors.task_id("smp_c"), number], 26)
        bits = np.array([words[2 * i] | words[2 * i + 1] << 32 for i in range(13)], np.uint64)
        order = np.argsort(bits.astype(np.int64), kind="stable")
        assert found[13 * number : 13 * (number + 1)] == order.tolist()


def test_equal_quotas_grouped_run_same_examples_as_solo():
    grouped = stream(EqualQuotas(12, seed=2), 240)
    for name in SIZES:
        solo = stream(EqualQuotas(4, seed=2), 80, names=(name,))
        assert [row for row in grouped if row[0] == name] == solo
    other_seed = stream(EqualQuotas(4, seed=3), 80, names=("smp_b",))
    assert other_seed != stream(EqualQuotas(4, seed=2), 80, names=("smp_b",))


def test_equal_quotas_every_step_has_equal_counts():
    rows = stream(EqualQuotas(12, seed=2), 120)
    for step in range(10):
        names = [name for name, _ in rows[12 * step : 12 * (step + 1)]]
        assert {name: names.count(name) for name in SIZES} == dict.fromkeys(SIZES, 4)


def test_task_mixture_without_shuffling_keeps_order():
    rows = stream(EqualQuotas(3, seed=2), 18, names=("smp_a",), shuffle=False)
    assert [number for _, number in rows] == [0, 1, 2, 3, 4] * 3 + [0, 1, 2]


def test_task_mixture_weights_are_capped_sizes_or_rates():
    sampler = PerExample(4, seed=0)
    sizes = np.array([5, 40, 13])
    assert TaskMixture("m", tuple(SIZES), sampler, cap=20).weights(sizes).tolist() == [5, 20, 13]
    rates = {"smp_a": 1.0, "smp_b": 2.0, "smp_c": 0.5}
    assert TaskMixture("m", tuple(SIZES), sampler, rates).weights(sizes).tolist() == [1, 2, 0.5]


def test_sampler_packed_batch_size_counts_examples():
    from mpt_jax.core.runs import Runs

    mixture = TaskMixture("m", tuple(SIZES), EqualQuotas(6, seed=0))
    converter = feature_converter.PromptFeatureConverter(
        2, Runs(list(SIZES)), True, pack_lengths={"inputs": 64, "targets": 32}, pack_window=6
    )
    dataset = seqio.get_dataset(mixture, {"inputs": 8, "targets": 2}, converter, num_epochs=None)
    row = next(dataset.as_numpy_iterator())
    starts = row["encoder_task_ids"][row["encoder_prompt_slots"] == 1]
    # Blocks of six examples, two for each task, here in one row.
    assert starts.tolist() == [0, 0, 1, 1, 2, 2]


def test_task_mixture_finite_epochs_use_seqio():
    mixture = TaskMixture("m", tuple(SIZES), EqualQuotas(6, seed=0))
    dataset = mixture.get_dataset({"inputs": 8, "targets": 2}, num_epochs=1, shuffle=False)
    assert 3 <= len(list(dataset)) <= sum(SIZES.values())


# --- Mixing weights and shares -----------------------------------------------------------------


def exact_shares(weights, batch):
    """The share of each task, summed over every order in which tasks may be drawn."""
    shares, tasks = np.zeros(len(weights)), range(len(weights))
    for order in itertools.permutations(tasks):
        rest, probability = sum(weights), 1.0
        for task in order:
            probability *= weights[task] / rest
            rest -= weights[task]
        for count in range(2, len(weights) + 1):
            for rank, task in enumerate(order[:count]):
                rows = batch // count + (rank < batch % count)
                shares[task] += probability * rows / batch / (len(weights) - 1)
    return shares


@pytest.mark.parametrize(
    "weights", [[90_000.0, 9_000.0, 900.0], [27_243.0, 9_427.0, 5_428.0, 554.0, 250.0]]
)
def test_stochastic_tasks_expected_shares_match_all_orders(weights):
    weights = np.array(weights)
    sampler = StochasticTasks(32, seed=3)
    found, expected = sampler.expected_shares(weights), exact_shares(weights, 32)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    # Of 2000 steps: four standard deviations of a share are 0.016 at most.
    np.testing.assert_allclose(Sampler.expected_shares(sampler, weights), expected, atol=0.016)


def test_expected_shares_are_proportional_unless_tasks_are_distinct():
    weights = np.array([27_243.0, 9_427.0, 5_428.0, 554.0, 250.0])
    for sampler in (StochasticTasks(32, 3, replacement=True), PerExample(32, 3)):
        shares = sampler.expected_shares(weights)
        np.testing.assert_allclose(shares, weights / weights.sum(), rtol=1e-12)
        np.testing.assert_allclose(Sampler.expected_shares(sampler, weights), shares, atol=0.016)
    np.testing.assert_allclose(EqualQuotas(4, 0).expected_shares(np.ones(2)), [0.5, 0.5])


def test_expected_shares_of_many_tasks_are_estimated():
    shares = StochasticTasks(32, seed=3, kappa=5).expected_shares(np.ones(40))
    np.testing.assert_allclose(shares, 1 / 40, atol=0.009)  # four standard deviations


def test_joint_targets_repeat_no_task_more_than_others():
    """SuperGLUE's tasks together: without replacement, CB would be passed 171 times."""
    sizes = [27_243, 9_427, 5_428, 554, 250]
    parse([TARGET, JOINT], [VOCABULARY, "TARGET_TASKS = ['multirc', 'boolq', 'wic', 'wsc', 'cb']"])
    sampler = value("SAMPLER")
    shares = sampler.expected_shares(np.array(sizes, float))
    np.testing.assert_allclose(18_303 * 32 * shares / sizes, 13.65, atol=0.01)
    without = "gin/ablations/joint_without_replacement.gin"
    parse(
        [TARGET, JOINT, without],
        [VOCABULARY, "TARGET_TASKS = ['multirc', 'boolq', 'wic', 'wsc', 'cb']"],
    )
    epochs = 18_303 * 32 * value("SAMPLER").expected_shares(np.array(sizes, float)) / sizes
    np.testing.assert_allclose(epochs, [6.8, 17.0, 25.1, 110.5, 171.3], atol=0.05)


def test_report_exposure_warns_of_more_than_fifty_passes(caplog):
    mixture = TaskMixture("m", tuple(SIZES), StochasticTasks(12, seed=1))
    assert mixture.exposure(100) == {}, "no examples have been read"
    list(mixture.get_dataset({"inputs": 8, "targets": 2}).take(1))
    with caplog.at_level(logging.INFO, "absl"):
        found = sampling.report_exposure(mixture, 100, True)
    share = exact_shares([5, 40, 13], 12)
    for number, (name, size) in enumerate(SIZES.items()):
        expected = {"share": share[number], "epochs": 1200 * share[number] / size}
        assert found[name] == pytest.approx(expected)
    (warning,) = [x for x in caplog.records if x.levelname == "WARNING"]
    message = warning.getMessage()
    assert f"smp_a {found['smp_a']['epochs']:.0f}" in message and "smp_b" not in message
    assert "StochasticTasks.replacement" in message and "TRAIN_STEPS" in message
    caplog.clear()
    with caplog.at_level(logging.INFO, "absl"):
        sampling.report_exposure(mixture, 10, True)
    assert "smp_b" in caplog.text and not any(x.levelname == "WARNING" for x in caplog.records)
    assert sampling.report_exposure(object(), 10, True) == {}


def test_report_exposure_does_not_warn_of_independent_runs(caplog):
    mixture = TaskMixture("m", tuple(SIZES), EqualQuotas(12, seed=1))
    list(mixture.get_dataset({"inputs": 8, "targets": 2}).take(1))
    with caplog.at_level(logging.INFO, "absl"):
        found = sampling.report_exposure(mixture, 100, False)
    assert found["smp_a"] == {"share": pytest.approx(1 / 3), "epochs": pytest.approx(80)}
    assert not any(x.levelname == "WARNING" for x in caplog.records)
    sampling.report_exposure(mixture, 100, True)  # one prompt for all of them
    (warning,) = [x.getMessage() for x in caplog.records if x.levelname == "WARNING"]
    assert "smp_a 80" in warning and "replacement" not in warning


def test_task_mixture_logs_shares_that_differ_from_sizes(caplog):
    with caplog.at_level(logging.INFO, "absl"):
        stream(StochasticTasks(12, seed=1), 1)
    (line,) = [x.getMessage() for x in caplog.records if "Expected share" in x.getMessage()]
    expected = exact_shares([5, 40, 13], 12)
    parts = dict(zip(SIZES, [0.09, 0.69, 0.22], strict=True))
    for (name, part), share in zip(parts.items(), expected, strict=True):
        found = float(line.split(f"{name} ")[1].split()[0])
        assert abs(found - share) <= 0.0051 and f"{name} {found:.2f} ({part:.2f})" in line
    caplog.clear()
    with caplog.at_level(logging.INFO, "absl"):
        stream(EqualQuotas(12, seed=1), 1)
    assert "Expected share" not in caplog.text


PAIR = ("smp_a", "smp_b")


@pytest.mark.parametrize(
    "sampler, names, reason",
    [
        (EqualQuotas(6, 1), tuple(SIZES), "EqualQuotas gives every task an equal share"),
        (StochasticTasks(6, 1), PAIR, "StochasticTasks gives each of them half of every batch"),
        (PerExample(6, 1), ("smp_a",), "the job has one task"),
        (None, tuple(SIZES), "a mixture without a sampler, for evaluation, has equal rates"),
    ],
)
def test_task_mixture_weights_without_effect_raise(sampler, names, reason):
    rates = {name: 1.0 + number for number, name in enumerate(names)}
    for name, setting in (("rates", rates), ("cap", 20)):
        with pytest.raises(ValueError, match=rf"task_mixture.{name} = .* no effect, .*{reason}"):
            sampling.task_mixture(list(names), sampler, **{name: setting})
    sampling.task_mixture(list(names), sampler)


def test_task_mixture_weights_with_effect_are_accepted():
    rates, sizes = {"smp_a": 2.0, "smp_b": 1.0}, np.array([5, 40, 13])
    rated = TaskMixture("m", PAIR, StochasticTasks(6, 1, replacement=True), rates)
    assert rated.weights(sizes[:2]).tolist() == [2, 1]
    capped = TaskMixture("m", tuple(SIZES), StochasticTasks(6, 1, kappa=2), cap=20)
    assert capped.weights(sizes).tolist() == [5, 20, 13]


# --- Errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: PerExample(0, 1),
            r"PerExample.batch_size must be a positive multiple .* hosts \(1\), got 0",
        ),
        (lambda: PerExample(6, 1, num_hosts=4), r"number of hosts \(4\), got 6"),
        (lambda: PerExample(6, -1), r"PerExample.seed must be from 0 to 2\^31 - 1, got -1"),
        (
            lambda: TaskMixture("m", tuple(SIZES), StochasticTasks(6, 1, kappa=4)),
            r"number of tasks \(3\), but kappa is 4. Change StochasticTasks.kappa",
        ),
        (
            lambda: TaskMixture("m", ["smp_a"], StochasticTasks(6, 1)),
            r"tasks \(1\), but kappa is 1. .* or for one task use sampling.EqualQuotas",
        ),
        (
            lambda: TaskMixture("m", tuple(SIZES), StochasticTasks(2, 1)),
            "A batch of 2 examples cannot hold kappa = 3 tasks",
        ),
        (
            lambda: TaskMixture("m", tuple(SIZES), EqualQuotas(8, 1)),
            r"multiple of the number of runs \(3\), got 8. Use 6, for example",
        ),
        (
            lambda: TaskMixture("m", tuple(SIZES), PerExample(8, 1), rates={"smp_a": 1.0}),
            "the tasks smp_a, smp_b, smp_c, got weights for smp_a",
        ),
        (
            lambda: TaskMixture("m", PAIR, PerExample(8, 1), {"smp_a": 1.0, "smp_b": 1.0}, cap=20),
            "task_mixture.cap = 20 would have no effect, because rates sets the mixing weights",
        ),
        (
            lambda: TaskMixture("m", PAIR, PerExample(8, 1), {"smp_a": 1.0, "smp_b": 0.0}),
            "Mixing weights must be positive, but rates has 0.0 for smp_b",
        ),
        (
            lambda: TaskMixture("m", PAIR, PerExample(8, 1), cap=0),
            "Mixing weights must be positive, but cap is 0",
        ),
        (
            lambda: TaskMixture("m", ["smp_aa"], PerExample(8, 1)),
            "Unknown task 'smp_aa'. Did you mean 'smp_a'",
        ),
    ],
)
def test_sampling_invalid_settings_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_task_mixture_seed_mismatch_raises():
    mixture = TaskMixture("m", tuple(SIZES), PerExample(8, 1))
    with pytest.raises(ValueError, match="DatasetConfig.seed is 2, but .* has the seed 1"):
        mixture.get_dataset({"inputs": 8, "targets": 2}, seed=2)


def test_task_mixture_missing_or_empty_split_raises():
    mixture = TaskMixture("m", ["smp_a"], EqualQuotas(2, 1))
    with pytest.raises(ValueError, match="Task 'smp_a' has no 'test' split; it has train."):
        mixture.get_dataset({"inputs": 8, "targets": 2}, split="test")
    register("smp_empty", 0)
    mixture = TaskMixture("m", ["smp_empty"], EqualQuotas(2, 1))
    with pytest.raises(ValueError, match="The 'train' split of task 'smp_empty' is empty"):
        mixture.get_dataset({"inputs": 8, "targets": 2})


def test_task_mixture_missing_data_error_names_source():
    def gone(split, shuffle_files, seed=None):
        raise FileNotFoundError("/no/such/folder")

    seqio.TaskRegistry.add(
        "smp_gone",
        source=seqio.FunctionDataSource(gone, splits=("train",)),
        preprocessors=preprocessors.finish("smp_gone"),
        output_features=preprocessors.output_features(seqio.ByteVocabulary()),
    )
    mixture = TaskMixture("m", ["smp_gone"], EqualQuotas(2, 1))
    message = "'train' split of task 'smp_gone' could not be read .* /no/such/folder.*tfds build"
    with pytest.raises(ValueError, match=message):
        mixture.get_dataset({"inputs": 8, "targets": 2})


def test_task_mixture_counts_overlong_examples():
    mixture = TaskMixture("m", ["smp_a", "smp_c"], EqualQuotas(2, 1))
    mixture.get_dataset({"inputs": 2, "targets": 2})
    assert mixture.overlong == {"smp_a": (0, 5), "smp_c": (3, 13)}  # 10, 11 and 12


def test_task_mixture_registration_is_idempotent():
    first = sampling.task_mixture(list(SIZES), PerExample(8, 1))
    assert sampling.task_mixture(list(SIZES), PerExample(8, 1)) == first
    assert sampling.task_mixture(list(SIZES), PerExample(8, 2)) != first
    named = sampling.task_mixture(list(SIZES), name="smp_named")
    assert named == "smp_named" == sampling.task_mixture(list(SIZES), name="smp_named")
    with pytest.raises(ValueError, match="A different mixture is registered as 'smp_named'"):
        sampling.task_mixture(["smp_a"], name="smp_named")
