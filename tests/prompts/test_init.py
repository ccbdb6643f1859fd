"""Tests of initializers against their definitions, on embeddings whose rows encode their ids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.prompts import init
from mpt_jax.prompts.base import InitContext

V, H, P = 50, 4, 8
# Row i is i + 0.001 * column, so a prompt row shows which id it was copied from.
EMBEDDING = np.arange(V)[:, None] + 0.001 * np.arange(H)[None]
WORDS = {"yes": [7], "no": [9], "not entailment": [11, 12, 16], "": []}
KEY = jax.random.PRNGKey(3)


class Words:
    """A vocabulary of the labels above."""

    def encode(self, s: str) -> list[int]:
        return WORDS[s]


CONTEXT = InitContext(jnp.asarray(EMBEDDING, jnp.float32), Words())


def ids_of(prompt) -> list[int]:
    """Returns the ids that prompt rows were copied from; fails if one is not an embedding row."""
    ids = np.asarray(prompt)[:, 0].round().astype(int)
    np.testing.assert_allclose(prompt, EMBEDDING[ids], atol=1e-5)
    return ids.tolist()


def test_sampled_vocabulary_copies_distinct_frequent_rows():
    prompt = init.SampledVocabulary(population=P)(KEY, "t", P, CONTEXT)
    assert sorted(ids_of(prompt)) == list(range(P)), "without replacement, all P are drawn"
    drawn = ids_of(init.SampledVocabulary()(KEY, "t", P, CONTEXT))
    assert len(set(drawn)) == P
    assert max(drawn) >= P, "the default population is wider than the prompt"


def test_sampled_vocabulary_draws_from_whole_population_only():
    draw = jax.jit(lambda key: init.SampledVocabulary(20)(key, "t", P, CONTEXT))
    prompts = [draw(jax.random.PRNGKey(seed)) for seed in range(60)]
    assert {i for prompt in prompts for i in ids_of(prompt)} == set(range(20))
    assert init.SampledVocabulary().population == 5000


def test_sampled_vocabulary_draws_from_given_ids_only():
    draw = jax.jit(lambda key: init.SampledVocabulary(ids=range(30, 40))(key, "t", P, CONTEXT))
    prompts = [draw(jax.random.PRNGKey(seed)) for seed in range(40)]
    assert {i for prompt in prompts for i in ids_of(prompt)} == set(range(30, 40))
    same = init.SampledVocabulary(ids=range(20))(KEY, "t", P, CONTEXT)
    np.testing.assert_array_equal(same, init.SampledVocabulary(20)(KEY, "t", P, CONTEXT))
    with pytest.raises(ValueError, match="ids from 5 to 9999, but the backbone embeds ids 0 to"):
        init.SampledVocabulary(ids=[5, 6, 7, 8, 9, 10, 11, 9999])(KEY, "t", P, CONTEXT)


def test_sampled_vocabulary_too_few_ids_raises():
    with pytest.raises(ValueError, match="8 distinct token ids from 5"):
        init.SampledVocabulary(population=5)(KEY, "t", P, CONTEXT)


def test_sampled_vocabulary_bfloat16_backbone_float32_prompt():
    context = InitContext(CONTEXT.embedding.astype(jnp.bfloat16))
    assert init.SampledVocabulary()(KEY, "t", P, context).dtype == jnp.float32


def test_uniform_fills_its_interval():
    prompt = np.asarray(init.Uniform()(KEY, "t", 400, CONTEXT))
    assert prompt.shape == (400, H)
    assert -0.5 <= prompt.min() < -0.49 and 0.49 < prompt.max() < 0.5
    assert abs(prompt.mean()) < 0.03


def test_class_labels_average_tokens_and_sample_rest():
    mode = init.ClassLabels({"nli": ["yes", "not entailment"], "other": ["no"]})
    prompt = np.asarray(mode(KEY, "nli", P, CONTEXT))
    np.testing.assert_allclose(prompt[0], EMBEDDING[7], atol=1e-5)
    np.testing.assert_allclose(prompt[1], EMBEDDING[[11, 12, 16]].mean(0), atol=1e-5)
    assert len(set(ids_of(prompt[2:]))) == P - 2
    other = np.asarray(mode(KEY, "other", P, CONTEXT))
    np.testing.assert_allclose(other[0], EMBEDDING[9], atol=1e-5)
    same = init.ClassLabels(["no"])(KEY, "whatever", P, CONTEXT)
    np.testing.assert_allclose(same[0], EMBEDDING[9], atol=1e-5)


@pytest.mark.parametrize(
    ("labels", "task", "message"),
    [
        ({"nli": ["yes"]}, "nlu", "no entry for the task 'nlu', only for nli"),
        (["yes", "no"] * 5, "t", "A prompt of 8 rows is too short for 10 labels"),
        ([""], "t", "zero tokens"),
    ],
)
def test_class_labels_invalid_labels_raise(labels, task, message):
    with pytest.raises(ValueError, match=message):
        init.ClassLabels(labels)(KEY, task, P, CONTEXT)


def test_text_init_copies_token_rows_in_order():
    prompt = init.Text("not entailment")(KEY, "t", P, CONTEXT)
    assert ids_of(prompt)[:3] == [11, 12, 16]
    with pytest.raises(ValueError, match="A prompt of 2 rows is too short for 3 tokens"):
        init.Text("not entailment")(KEY, "t", 2, CONTEXT)


@pytest.mark.parametrize("mode", [init.Text("yes"), init.ClassLabels(["yes"])])
def test_word_initializers_without_vocabulary_raise(mode):
    with pytest.raises(ValueError, match="'yes' needs a vocabulary"):
        mode(KEY, "t", P, InitContext(CONTEXT.embedding))


def test_from_array_checks_shape_and_never_unpickles(tmp_path):
    values = np.random.default_rng(0).normal(size=(P, H))
    np.save(tmp_path / "prompt.npy", values)
    prompt = init.FromArray(str(tmp_path / "prompt.npy"))(KEY, "t", P, CONTEXT)
    assert prompt.dtype == jnp.float32
    np.testing.assert_allclose(prompt, values, atol=1e-7)
    with pytest.raises(ValueError, match=r"shape \(8, 4\).*shape \(9, 4\)"):
        init.FromArray(str(tmp_path / "prompt.npy"))(KEY, "t", P + 1, CONTEXT)
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="type object"):
        init.FromArray(str(tmp_path / "pickled.npy"))(KEY, "t", P, CONTEXT)


@pytest.mark.parametrize("rank", [1, 3])
def test_factor_initializers_have_documented_distributions(rank):
    shape = {"prompt_length": 300, "width": 200, "rank": rank}

    def factors(initialize):
        left, right = map(np.asarray, initialize(KEY, *shape.values()))
        assert (left.shape, right.shape) == ((300, rank), (rank, 200))
        assert left.dtype == right.dtype == np.float32
        return left, right

    left, right = factors(init.normal002)
    for side in (left, right):
        assert abs(side.mean()) < 0.005 and 0.018 < side.std() < 0.022
    assert not np.array_equal(left[:200, 0], right[0])

    left, right = factors(init.ones_noise)
    product = left @ right
    assert abs(product.mean() - 1) < 0.01, "a new P* keeps its scale"
    assert 0 < product.std() < 0.04, "entries of the product differ"
    for first, others in ((left[:, :1], left[:, 1:]), (right[:1], right[1:])):
        assert 0.018 < first.std() < 0.022 and abs(first.mean() - 1) < 0.005
        assert not others.size or (0.018 < others.std() < 0.022 and abs(others.mean()) < 0.005)

    left, right = factors(init.signs)
    assert set(np.unique(right)) == {-1.0, 1.0}
    np.testing.assert_allclose(np.abs(left), rank**-0.5, atol=1e-6)
    assert abs(np.square(left @ right).mean() - 1) < 0.1


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_ones_noise_first_step_of_adam_changes_products_alike_at_every_rank(rank):
    """Every entry of a factor moves by the learning rate, in the sign of its gradient."""
    left, right = init.ones_noise(KEY, 100, 128, rank)
    gradient = np.random.default_rng(0).normal(size=(100, 128))
    step = 0.001
    of_left = left - step * np.sign(gradient @ right.T)
    of_right = right - step * np.sign(left.T @ gradient)
    for moved in (of_left @ right, left @ of_right):
        change = np.sqrt(np.square(moved - left @ right).mean())
        assert change == pytest.approx(step, rel=0.02)


def test_factor_initializers_different_keys_differ():
    for initialize in (init.ones_noise, init.normal002, init.signs):
        first = initialize(jax.random.PRNGKey(0), 5, 6, 2)
        second = initialize(jax.random.PRNGKey(1), 5, 6, 2)
        assert not np.array_equal(first[0], second[0]) and not np.array_equal(first[1], second[1])
