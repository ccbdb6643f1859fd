"""Path names, label tables, splitting, strict matching and checks of values."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpt_jax.core import tree

PARAMS = {
    "encoder": {"layers_0": {"mlp": {"wi": {"kernel": 1, "bias": 2}}}, "norm": {"scale": 3}},
    "prompt": {"shared": 4, "task_left": 5},
}
NAMES = {
    "encoder/layers_0/mlp/wi/bias": 2,
    "encoder/layers_0/mlp/wi/kernel": 1,
    "encoder/norm/scale": 3,
    "prompt/shared": 4,
    "prompt/task_left": 5,
}
RULES = (
    (r"encoder/.*/bias", "bias"),
    (r"prompt/shared", "shared"),
    (r"prompt/.*", "task"),
    (r"encoder/.*", "frozen"),
)


def test_flatten_nested_dict_path_names_and_unflatten_inverts():
    assert tree.flatten(PARAMS) == NAMES
    assert tree.unflatten(tree.flatten(PARAMS)) == PARAMS


def test_flatten_lists_and_named_tuples_path_names():
    state = optax.scale_by_adam().init({"a": jnp.zeros(2)})
    assert sorted(tree.flatten((state, [7]))) == ["0/count", "0/mu/a", "0/nu/a", "1/0"]


def test_unflatten_leaf_below_leaf_error():
    with pytest.raises(ValueError, match=r"'x/a/b/c' is below 'x/a'"):
        tree.unflatten({"x/a": 1, "x/a/b/c": 2})
    with pytest.raises(ValueError, match=r"'a' has other parameters below it"):
        tree.unflatten({"a/b": 2, "a": 1})


def test_label_tree_several_matching_rules_first_wins():
    assert tree.flatten(tree.label_tree(PARAMS, RULES)) == {
        "encoder/layers_0/mlp/wi/bias": "bias",
        "encoder/layers_0/mlp/wi/kernel": "frozen",
        "encoder/norm/scale": "frozen",
        "prompt/shared": "shared",
        "prompt/task_left": "task",
    }


@pytest.mark.parametrize("pattern", ["encoder", "shared", "prompt/share", "rompt/shared"])
def test_label_tree_partial_match_error(pattern):
    with pytest.raises(ValueError, match="prompt/shared"):
        tree.label_tree(PARAMS, [(pattern, "x"), ("encoder/.*|prompt/task_left", "y")])


def test_label_tree_unmatched_leaves_error_lists_leaves_and_rules():
    with pytest.raises(ValueError) as error:
        tree.label_tree(PARAMS, RULES[:2])
    for name in ("encoder/layers_0/mlp/wi/kernel", "encoder/norm/scale", "prompt/task_left"):
        assert name in str(error.value)
    assert "encoder/.*/bias, prompt/shared." in str(error.value), "the rules tried are listed"
    assert "bias" not in str(error.value).split("rules tried")[0], "matched leaves are not"


def test_split_by_label_and_merge_inverts():
    kept, rest = tree.split(PARAMS, RULES, {"shared", "bias"})
    assert kept == {
        "encoder": {"layers_0": {"mlp": {"wi": {"bias": 2}}}},
        "prompt": {"shared": 4},
    }
    assert rest == {
        "encoder": {"layers_0": {"mlp": {"wi": {"kernel": 1}}}, "norm": {"scale": 3}},
        "prompt": {"task_left": 5},
    }
    assert tree.merge(kept, rest) == PARAMS
    assert tree.merge(rest, kept) == PARAMS


def test_merge_leaf_in_both_trees_error():
    with pytest.raises(ValueError, match=r"both trees: prompt/shared"):
        tree.merge({"prompt": {"shared": 1}}, {"prompt": {"shared": 2}, "a": 3})


def test_match_exactly_other_order_passes():
    tree.match_exactly({"a": (2, 3), "b": ()}, {"b": (), "a": (2, 3)}, "x")


def test_match_exactly_mismatch_error_lists_each_problem():
    expected = {"same": (1,), "gone": (2,), "wider": (3, 4)}
    found = {"same": (1,), "new": (2,), "wider": (3, 5)}
    with pytest.raises(ValueError) as error:
        tree.match_exactly(expected, found, "The file f")
    message = str(error.value)
    assert message.startswith("The file f does not match the model.")
    assert "1 missing: gone" in message
    assert "1 not expected: new" in message
    assert "wider: expected (3, 4), found (3, 5)" in message
    assert "same" not in message


@pytest.mark.parametrize("dtype", tree.FLOATS)
def test_check_floats_finite_values_pass(dtype):
    values = np.full((3, 70_000), 1e4).astype(dtype)
    tree.check_floats({"a": values, "b": values.T, "c": values[:, ::2], "d": values[:0]}, "It")


@pytest.mark.parametrize("dtype", tree.FLOATS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_check_floats_one_broken_value_is_named(dtype, value):
    broken = np.zeros((3, 70_000)).astype(dtype)
    broken[2, 69_999] = value
    for leaf in (broken, broken.T):
        with pytest.raises(ValueError, match="It has .*NaN or infinite values: b. Advice."):
            tree.check_floats({"a": np.zeros(3), "b": leaf}, "It", "Advice.")


@pytest.mark.parametrize("dtype", ["int8", "int64", "bool", "complex64", "float8_e4m3fn"])
def test_check_floats_other_dtype_is_named(dtype):
    with pytest.raises(ValueError, match=rf"It has .* not supported: b \({dtype}\)"):
        tree.check_floats({"a": np.zeros(3), "b": np.zeros(3).astype(dtype)}, "It")
