"""Prompt bank of many artifacts: equal prompts, documented memory, and no recompilation."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.artifacts import artifacts, compatibility
from mpt_jax.core.runs import Runs
from mpt_jax.prompts import get_method, method_names
from mpt_jax.prompts.attempt import ATTEMPT
from mpt_jax.prompts.base import InitContext, PromptContext, row_axes
from mpt_jax.prompts.mpt import MPT
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.serving import prompt_bank
from mpt_jax.serving.prompt_bank import Bank, Named, compose
from tests.fixtures import tiny
from tests.fixtures.saved_artifacts import save

P, H = 4, 6
WITH_PROMPTS = [name for name in method_names() if name != "none"]


def write(folder, names, *, groups="joint", seed=0, method=None, width=H, params=None, **overrides):
    """Writes an artifact with random parameters, and loads it."""
    method = method or MPT(P)
    runs = Runs(names, groups=groups)
    rng = np.random.default_rng([seed, *map(ord, "".join(names))])
    context = InitContext(jnp.zeros((200, width)))
    shapes = jax.eval_shape(lambda key: method.init(key, runs, context), jax.random.PRNGKey(0))
    made = {}
    for name, leaf in shapes.items():
        # Parameters without rows are the same in all artifacts.
        own = rng if f"prompt/{name}" in row_axes(method) else np.random.default_rng(0)
        made[name] = own.normal(size=leaf.shape).astype(np.float32)
    save(folder, method, made | (params or {}), runs, **overrides)
    return artifacts.load_artifact(folder)


def composed(of: Bank, names) -> np.ndarray:
    rows = jnp.asarray([of.row(name) for name in names])
    return np.asarray(prompt_bank.compose(of.method, of.arrays, rows, text(len(rows))))


def text(rows: int) -> jax.Array:
    """Pooled texts, for methods that read the text."""
    return jnp.linspace(-1, 1, rows * H).reshape(rows, H)


def groups_of(of: Bank) -> int:
    return len(set(np.asarray(of.arrays[prompt_bank.GROUPS])[: len(of.names)].tolist()))


def room_of(of: Bank) -> int:
    return len(of.arrays[prompt_bank.GROUPS])


# --- Values --------------------------------------------------------------------------------------


def test_bank_rows_of_many_artifacts_match_formula(tmp_path):
    found = [
        write(tmp_path / "a", ["rte", "cb", "wic"], groups=[0, 1, 0]),
        write(tmp_path / "b", ["boolq"]),
        write(tmp_path / "c", ["mrpc", "qqp"]),
    ]
    joined = Bank(found)
    assert joined.names == ("rte", "cb", "wic", "boolq", "mrpc", "qqp")
    assert groups_of(joined) == 4
    for artifact in found:
        shared, left, right = (
            np.asarray(artifact.params[name]) for name in ("shared", "task_left", "task_right")
        )
        for row, name in enumerate(artifact.runs.run_names):
            group = artifact.runs.group_of_row[row]
            expected = shared[group] * (left[row] @ right[row])
            np.testing.assert_allclose(composed(joined, [name])[0], expected, rtol=1e-6)
    mixed = composed(joined, ["qqp", "cb", "qqp", "boolq"])
    np.testing.assert_array_equal(mixed[0], mixed[2])
    np.testing.assert_array_equal(mixed[1], composed(joined, ["cb"])[0])


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("name", WITH_PROMPTS)
def test_bank_every_method_matches_its_prompts(name, folded, tmp_path):
    method = tiny.method(name, P)
    if folded and method.reads_text:
        pytest.skip("its prompts depend on the text, so no row has a plain prompt")
    found = [
        write(tmp_path / "a", ["x", "y"], method=method, groups="independent"),
        write(tmp_path / "b", ["z"], method=method),
    ]
    joined = Bank(found, folded=folded)
    rows, given = iter(text(3)), []
    for artifact in found:
        texts = jnp.stack([next(rows) for _ in range(artifact.runs.num_rows)])
        every = jnp.arange(artifact.runs.num_rows)
        params = jax.tree.map(jnp.asarray, artifact.params)
        given.append(artifact.method.compose(params, artifact.runs, every, PromptContext(texts)))
    expected = np.concatenate(given)
    np.testing.assert_allclose(composed(joined, ["x", "y", "z"]), expected, atol=1e-6)
    assert joined.method == (PromptTuning(P) if folded else found[0].method)


def test_bank_several_methods_need_folded(tmp_path):
    found = [
        write(tmp_path / "a", ["x"]),
        write(tmp_path / "b", ["y"], method=PromptTuning(P)),
        write(tmp_path / "c", ["z"], method=MPT(P, rank=2)),
    ]
    with pytest.raises(ValueError, match="method differs: .*mpt.*a; prompt_tuning.*b.*--folded"):
        Bank(found)
    joined = Bank(found, folded=True)
    for artifact in found:
        np.testing.assert_array_equal(composed(joined, artifact.runs.run_names), artifact.folded())


# --- Memory --------------------------------------------------------------------------------------


def test_bank_nbytes_matches_formula(tmp_path):
    length, width, shared = 100, 768, {"shared": np.ones((1, 100, 768), np.float32)}
    found = [
        write(
            tmp_path / name, [f"{name}{i}" for i in range(count)],
            method=MPT(length), width=width, params=shared,
        )
        for name, count in (("a", 3), ("b", 6))
    ]  # fmt: skip
    joined = Bank(found)
    assert room_of(joined) == 16 and groups_of(joined) == 1
    own = length + width
    assert own == 868
    expected = 4 * (16 * (own + 1) + 1 * length * width)
    assert joined.nbytes == expected
    assert joined.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(joined.arrays))
    folded = Bank(found, folded=True)
    assert folded.nbytes == 4 * 16 * (length * width + 1)


def test_bank_memory_in_docs_matches_formula():
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    rows, own, shared = 16_384, 868, 100 * 768  # 10,000 tasks in the next power of two
    for size, shown in (
        (4 * (rows * (own + 1) + shared), "{:.1f} MiB"),
        (4 * rows * (shared + 1) / 1024, "{:.1f} GiB"),
        (4 * (rows + shared), "{:.1f} MiB"),
    ):
        assert shown.format(size / 2**20) in text
    assert f"{own + shared:,} numbers" in text


def test_bank_equal_groups_are_stored_once(tmp_path):
    shared = np.arange(P * H, dtype=np.float32).reshape(1, P, H)
    other = shared.copy()
    other[0, 1, 2] = np.nextafter(other[0, 1, 2], 9)
    found = [
        write(tmp_path / name, [name], params={"shared": value})
        for name, value in (("a", shared), ("b", other), ("c", shared))
    ]
    joined = Bank(found)
    assert groups_of(joined) == 2
    for artifact in found:
        np.testing.assert_array_equal(composed(joined, artifact.runs.run_names), artifact.folded())


# --- Growth --------------------------------------------------------------------------------------


def test_bank_add_below_capacity_compiles_nothing(tmp_path):
    shared = {"shared": np.ones((1, P, H), np.float32)}
    made = iter([write(tmp_path / f"{i}", [f"task{i}"], params=shared) for i in range(9)])
    joined = Bank([next(made)])
    compiled = jax.jit(lambda arrays, rows: prompt_bank.compose(joined.method, arrays, rows))
    sizes, rows = [], jnp.zeros(3, jnp.int32)
    for artifact in made:
        before = joined.arrays
        kept = np.asarray(compiled(before, rows))
        joined.add(artifact)
        last = jnp.full(3, joined.row(artifact.runs.run_names[0]), jnp.int32)
        found = np.asarray(compiled(joined.arrays, last))
        np.testing.assert_array_equal(found[0], artifact.folded()[0])
        np.testing.assert_array_equal(np.asarray(compiled(before, rows)), kept)
        sizes.append((room_of(joined), compiled._cache_size()))
    assert sizes == [(2, 2), (4, 3), (4, 3), (8, 4), (8, 4), (8, 4), (8, 4), (16, 5)]


def test_bank_failed_add_leaves_bank_unchanged(tmp_path):
    joined = Bank([write(tmp_path / "a", ["x", "y"])])
    before, digest = composed(joined, ["x", "y"]), joined.digest()
    for wrong, message in (
        (write(tmp_path / "b", ["z", "x"]), "'x', one from .*a, one from .*b.*NAME="),
        (write(tmp_path / "c", ["z"], embedding_sha256="f" * 64), "backbone"),
    ):
        with pytest.raises(ValueError, match=message):
            joined.add(wrong)
        assert joined.names == ("x", "y") and joined.digest() == digest
        np.testing.assert_array_equal(composed(joined, ["x", "y"]), before)


def test_bank_digest_covers_names_and_values(tmp_path):
    a, b = write(tmp_path / "a", ["x"]), write(tmp_path / "b", ["x"], seed=1)
    c = write(tmp_path / "c", ["y"])
    digests = [
        Bank([a]).digest(),
        Bank([b]).digest(),
        Bank([a], ["y"]).digest(),
        Bank([a, c]).digest(),
        Bank([c, a]).digest(),
    ]
    assert len(set(digests)) == len(digests)
    grown = Bank([a])
    grown.add(c)
    assert grown.digest() == Bank([a, c]).digest()


# --- Names ---------------------------------------------------------------------------------------


def test_bank_duplicate_names_fail_unless_renamed(tmp_path):
    a, b = write(tmp_path / "a", ["rte", "cb"]), write(tmp_path / "b", ["rte"], seed=1)
    with pytest.raises(ValueError, match=f"'rte', one from {tmp_path}/a, one from {tmp_path}/b"):
        Bank([a, b])
    joined = Bank([a, b], ["", "rte_again"])
    assert joined.names == ("rte", "cb", "rte_again")
    np.testing.assert_array_equal(composed(joined, ["rte_again"]), b.folded())
    assert Bank([a, b], ["first", ""]).names == ("first/rte", "first/cb", "rte")


def test_named_parse_accepts_folder_or_name_and_folder(tmp_path):
    assert Named.parse("runs/a") == Named("runs/a")
    assert Named.parse("new=runs/a") == Named("runs/a", "new")
    assert Named.parse("runs/lr=0.3/artifact") == Named("runs/lr=0.3/artifact")
    (tmp_path / "lr=1").mkdir()
    assert Named.parse(str(tmp_path / "lr=1")) == Named(str(tmp_path / "lr=1"))
    with pytest.raises(ValueError, match="'=runs' is neither"):
        Named.parse("=runs")


def test_bank_unknown_task_suggests_closest_names(tmp_path):
    joined = Bank([write(tmp_path / "a", [f"task_{i:03}" for i in range(50)])])
    with pytest.raises(ValueError) as error:
        joined.row("taks_017")
    message = str(error.value)
    assert "Unknown task 'taks_017'. Did you mean 'task_017'" in message
    assert "and 30 more" in message and "task_040" not in message


def test_large_bank_unknown_task_skips_search(tmp_path, monkeypatch):
    names = [f"task_{i:04}" for i in range(prompt_bank.MOST_COMPARED + 1)]
    joined = Bank([write(tmp_path / "a", names)])
    monkeypatch.setattr(prompt_bank.difflib, "get_close_matches", None)  # 27 microseconds a name
    with pytest.raises(ValueError, match=f"'taks_0017'. The bank has .* {len(names) - 20} more"):
        joined.row("taks_0017")


def test_bank_long_unknown_name_is_shortened(tmp_path):
    joined = Bank([write(tmp_path / "a", ["rte"])])
    with pytest.raises(ValueError) as error:
        joined.row("x" * 100_000)
    assert f"'{'x' * 77}...'" in str(error.value) and len(str(error.value)) < 200


# --- Incompatible artifacts ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "other"),
    [
        ("backbone", {"embedding_sha256": "f" * 64}),
        ("backbone", {"backbone_sha256": "f" * 64}),
        ("vocabulary", {"vocabulary_sha256": "w" * 64}),
        ("prompt length", {"method": MPT(P + 1)}),
        ("method", {"method": MPT(P, rank=2)}),
    ],
)
def test_bank_incompatible_artifacts_are_named_by_value(what, other, tmp_path):
    found = [
        write(tmp_path / "a", ["x"], backbone_sha256="b" * 64),
        write(tmp_path / "b", ["y"], backbone_sha256="b" * 64),
        write(tmp_path / "c", ["z"], **{"backbone_sha256": "b" * 64, **other}),
    ]
    with pytest.raises(ValueError, match=f"their {what}.*differs") as error:
        Bank(found)
    message = str(error.value)
    assert f"in {tmp_path}/a, {tmp_path}/b; " in message and f"in {tmp_path}/c." in message
    assert ("Use --folded" in message) == (what in ("prompt length", "method"))
    value = str(next(iter(other.values())))
    assert (value if what in ("backbone", "vocabulary") else str(P)) in message


def test_bank_unknown_vocabulary_is_compatible(tmp_path):
    found = [
        write(tmp_path / "a", ["x"], vocabulary_sha256=None),
        write(tmp_path / "b", ["y"]),
    ]
    assert Bank(found).names == ("x", "y")


def test_bank_first_known_vocabulary_binds_later_artifacts(tmp_path):
    unknown = write(tmp_path / "a", ["x"], vocabulary_sha256=None)
    joined, named = Bank([unknown]), write(tmp_path / "b", ["y"])
    joined.add(named)
    joined.add(write(tmp_path / "c", ["z"], vocabulary_sha256=None))
    with pytest.raises(ValueError, match="vocabulary.*differs.*v{64} in .*b; w{64} in .*d"):
        joined.add(write(tmp_path / "d", ["q"], vocabulary_sha256="w" * 64))
    with pytest.raises(ValueError, match="another vocabulary"):
        joined.check_vocabulary("w" * 64)
    assert joined.names == ("x", "y", "z")


def test_bank_served_vocabulary_binds_later_artifacts(tmp_path):
    joined = Bank([write(tmp_path / "a", ["x"], vocabulary_sha256=None)])
    joined.check_vocabulary("w" * 64)
    joined.check_vocabulary(None)
    with pytest.raises(ValueError, match="b was trained with another vocabulary: sha256 v{64}"):
        joined.add(write(tmp_path / "b", ["y"]))
    assert joined.names == ("x",)
    joined.add(write(tmp_path / "c", ["z"], vocabulary_sha256="w" * 64))


def test_bank_weights_checked_and_missing_digests_named(tmp_path):
    """Of several artifacts, the first lacks the digest, so only its embedding is compared."""
    joined = Bank(
        [write(tmp_path / "a", ["x"]), write(tmp_path / "b", ["y"], backbone_sha256="b" * 64)]
    )
    with pytest.raises(ValueError, match="weights is b{64}, .* weights is c{64}"):
        joined.check_backbone("e" * 64, "c" * 64, {})
    said: list[str] = []
    joined.check_backbone("e" * 64, "b" * 64, {}, said.append)
    assert said[0].startswith(f"{tmp_path}/a records no backbone_sha256")
    assert said[1:] == [compatibility.weights_only(f"{tmp_path}/b")]


def test_bank_served_backbone_binds_later_artifacts(tmp_path, caplog):
    joined = Bank([write(tmp_path / "a", ["x"])])
    joined.check_backbone("e" * 64, "b" * 64, {})
    with pytest.raises(ValueError, match="b was trained on another backbone.*c{64}.*b{64}"):
        joined.add(write(tmp_path / "b", ["y"], backbone_sha256="c" * 64))
    assert joined.names == ("x",)
    joined.add(write(tmp_path / "c", ["z"], backbone_sha256="b" * 64))
    caplog.clear()
    with caplog.at_level("WARNING", logger="absl"):
        joined.add(write(tmp_path / "d", ["q"]))
    assert f"{tmp_path}/d records no backbone_sha256" in caplog.text


def test_bank_without_artifacts_fails():
    with pytest.raises(ValueError, match="at least one"):
        Bank([])


def attempt_artifact(task, sources, seed=0):
    """An artifact of ATTEMPT for one task, with the given frozen sources [S, P, H]."""
    method = ATTEMPT(P, [f"s{i}" for i in range(len(sources))])
    rng = np.random.default_rng(seed)
    shapes = {"target": (1, P, H), "down": (1, H, 100), "up": (1, 100, H)}
    shapes |= {"norm_scale": (1, H), "norm_bias": (1, H)}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    params["sources"] = sources
    known = {"embedding_sha256": "e" * 64, "vocabulary_sha256": None}
    return artifacts.Artifact(task, method, Runs([task]), params, known)


def test_bank_shared_parameters_must_be_equal():
    sources = np.random.default_rng(3).normal(size=(2, P, H)).astype(np.float32)
    x, y = attempt_artifact("x", sources, 1), attempt_artifact("y", sources, 2)
    bank = Bank([x, y])
    np.testing.assert_array_equal(bank.arrays["prompt"]["sources"], sources)
    pooled = jnp.asarray(np.random.default_rng(4).normal(size=(2, H)), jnp.float32)
    found = compose(bank.method, bank.arrays, jnp.array([1, 0]), pooled)
    for artifact, prompt, text in zip((y, x), found, pooled, strict=True):
        alone = jax.tree.map(jnp.asarray, artifact.params)
        given = PromptContext(text[None])
        expected = artifact.method.compose(alone, artifact.runs, jnp.array([0]), given)[0]
        np.testing.assert_allclose(prompt, expected, atol=1e-5)
    with pytest.raises(ValueError, match="x and z differ in 'sources'"):
        Bank([x, attempt_artifact("z", sources + 1)])
    with pytest.raises(ValueError, match="depend on the text"):
        Bank([x], folded=True)


def test_folded_bank_holds_several_prompt_lengths(tmp_path):
    long, short = write(tmp_path / "a", ["x"]), write(tmp_path / "b", ["y"], method=MPT(P - 1))
    bank = Bank([short, long], folded=True)
    assert bank.lengths_differ and bank.method.prompt_length == P
    np.testing.assert_array_equal(bank.arrays["prompt_lengths"][:2], [P - 1, P])
    table = np.asarray(bank.arrays["prompt"]["table"])
    np.testing.assert_allclose(table[0, : P - 1], short.folded()[0], atol=1e-6)
    assert not table[0, P - 1 :].any()
    uniform = Bank([long], folded=True)
    with pytest.raises(ValueError, match=f"of {P - 1} positions, but the bank was built for {P}"):
        uniform.add(short, "z")


def test_bank_load_uses_given_names(tmp_path):
    write(tmp_path / "a", ["x"])
    loaded = Bank.load([Named(str(tmp_path / "a"), "y")])
    assert loaded.names == ("y",) and isinstance(loaded.method, get_method("mpt"))


T5 = {"mlp_activations": ["relu"], "relative_attention_max_distance": 128}


def test_bank_configuration_of_backbone_checked_and_binds_later_artifacts(tmp_path, caplog):
    known = {"backbone_sha256": "b" * 64, "backbone_config": T5}
    joined = Bank([write(tmp_path / "a", ["x"], **known)])
    other = {**T5, "mlp_activations": ["gelu"]}
    message = r"\(mlp_activations: saved \['relu'\], current \['gelu'\]\)"
    with pytest.raises(ValueError, match=f"a was trained with another configuration .*{message}"):
        joined.check_backbone("e" * 64, "b" * 64, other)
    joined.check_backbone("e" * 64, "b" * 64, T5)
    with pytest.raises(ValueError, match="their configuration of the backbone differs"):
        joined.add(write(tmp_path / "b", ["y"], **{**known, "backbone_config": other}))
    with caplog.at_level("WARNING", logger="absl"):
        joined.add(write(tmp_path / "c", ["z"], backbone_sha256="b" * 64))
    assert f"{tmp_path}/c records no backbone_config" in caplog.text
    unknown = Bank([write(tmp_path / "d", ["x"], backbone_sha256="b" * 64)])
    said: list[str] = []
    unknown.check_backbone("e" * 64, "b" * 64, T5, said.append)
    assert len(said) == 1 and said[0].startswith(f"{tmp_path}/d records no backbone_config")
    with pytest.raises(ValueError, match="b was trained with another configuration"):
        unknown.add(artifacts.load_artifact(tmp_path / "b"))
