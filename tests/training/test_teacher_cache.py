"""Cached teacher outputs against teachers that run in every step."""

from __future__ import annotations

import functools
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mpt_jax.backbones.t5.config import t5_config
from mpt_jax.core.batch import TEACHER_FEATURES
from mpt_jax.core.runs import Runs
from mpt_jax.core.tree import flatten, split
from mpt_jax.models import encoder_decoder, losses
from mpt_jax.models.losses import Distillation, Objective
from mpt_jax.training import teacher_cache, train_step, trainer
from mpt_jax.training.partitioning import PjitPartitioner
from mpt_jax.training.state import create_train_state
from mpt_jax.training.teacher_cache import TeacherCache, needed_bytes
from tests.fixtures import tiny

KEY = jax.random.PRNGKey(0)
ROOM = 10**9
BATCH = tiny.batch([0, 1, None, 2, 1, 0, 2, 0], seed=2)


def model(distillation=None, **overrides):
    objective = Objective(distillation=distillation or Distillation())
    return tiny.model(objective=objective, **overrides)


def started(found, settings=None, num_microbatches=None, partitioner=None) -> trainer.Trainer:
    partitioner = partitioner or PjitPartitioner()
    tree = jax.tree.map(jnp.array, tiny.params(found))
    state = create_train_state(found, tree, partitioner)
    return trainer.Trainer(found, state, partitioner, KEY, num_microbatches, teacher_cache=settings)


def opened(found, settings, num_microbatches=1):
    """Returns an empty cache, and a function that adds its outputs to a batch."""
    state = tiny.state(found, tiny.params(found))
    partitioner = PjitPartitioner()
    cache = settings.open(found, state, partitioner, num_microbatches)

    def add(batch):
        with partitioner.activate():
            return cache.add(state.frozen, batch)

    return cache, add


def calls(cache, monkeypatch) -> list[int]:
    """Records the number of rows of every teacher forward pass from now on."""
    rows, teach = [], cache._teach

    def counted(frozen, batch):
        rows.append(len(batch["encoder_input_tokens"]))
        return teach(frozen, batch)

    monkeypatch.setattr(cache, "_teach", counted)
    return rows


def bits(tree) -> dict[str, bytes]:
    return {name: np.asarray(leaf).tobytes() for name, leaf in flatten(tree).items()}


# --- The numbers ---------------------------------------------------------------------------------

OBJECTIVES = {
    "both": Distillation(),
    "logits": Distillation(hidden=False, temperature=2.0),
    "hidden": Distillation(logits=False, hidden_layers="all", include_prompt_positions=False),
    "two layers": Distillation(hidden_layers=(0, 2), weight=3.0),
}


@functools.cache
def gradients(name):
    """Returns gradients and metrics without a cache, and for each storage dtype."""
    # The decoder has one layer fewer than the encoder; add one, so that it has state 2.
    found = model(OBJECTIVES[name], config=tiny.config(num_decoder_layers=2))
    trainable, frozen = split(tiny.params(found), found.labels, {"shared", "task"})
    step = jax.jit(functools.partial(train_step.gradients, found, num_microbatches=2))
    given: dict[str | None, dict[str, np.ndarray]] = {None: BATCH}
    for dtype in teacher_cache.DTYPES:
        given[dtype] = opened(found, TeacherCache(ROOM, dtype))[1](BATCH)
    return {dtype: step(trainable, frozen, batch, None) for dtype, batch in given.items()}


BY_OBJECTIVE = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "both" else pytest.mark.slow) for name in OBJECTIVES],
)


@BY_OBJECTIVE
def test_teacher_cache_float32_gradients_match_running_teachers(name):
    expected, found = gradients(name)[None], gradients(name)["float32"]
    tiny.close(found[0], expected[0], 1e-6, "gradients: ")
    tiny.close(
        {name: metric.sum for name, metric in found[1].items()},
        {name: metric.sum for name, metric in expected[1].items()},
        1e-6,
        "metrics: ",
    )


@BY_OBJECTIVE
def test_teacher_cache_bfloat16_changes_gradients_by_under_one_percent(name):
    expected, found = gradients(name)[None], gradients(name)["bfloat16"]
    for term, metric in expected[1].items():
        np.testing.assert_allclose(found[1][term].sum, metric.sum, rtol=1e-2, err_msg=term)
    for leaf, gradient in flatten(expected[0]).items():
        difference = np.linalg.norm(flatten(found[0])[leaf] - gradient)
        assert 0 < difference < 1e-2 * np.linalg.norm(gradient), leaf


def test_teacher_features_bfloat16_logits_precise_near_largest():
    """T5's logits are all far from zero; those of likely tokens are near the largest."""
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(2, 3, 50)) * 5 - 40).astype(np.float32)
    distillation, same = Distillation(hidden=False), lambda states: states
    teacher = losses.ModelOutputs(jnp.asarray(logits))
    made = losses.teacher_features(distillation, teacher, same)["teacher_logits"]
    kept = np.asarray(made.astype(jnp.bfloat16), np.float64)
    exact = logits - logits.max(-1, keepdims=True).astype(np.float64)
    assert (np.abs(kept - exact) <= np.abs(exact) / 256).all()
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (exact, kept))
    plain = logits.astype(ml_dtypes.bfloat16).astype(np.float64)
    worse = np.exp(plain) / np.exp(plain).sum(-1, keepdims=True)
    assert 20 * np.abs(p - q).max() < np.abs(p - worse).max()


def test_teacher_cache_bfloat16_backbone_states_exact():
    found = model(Distillation(logits=False), config=tiny.config(dtype="bfloat16"))
    kept = [opened(found, TeacherCache(ROOM, dtype))[1](BATCH) for dtype in teacher_cache.DTYPES]
    for name in ("teacher_encoded", "teacher_decoded"):
        short, long = (np.asarray(given[name], np.float32) for given in kept)
        assert np.abs(long).max() > 0.1
        np.testing.assert_array_equal(short, long)


def epochs(count=3, rows=12) -> list[dict[str, np.ndarray]]:
    """Batches of 4 of the same examples, in another order in every epoch."""
    examples = tiny.batch([row % 3 for row in range(rows)], seed=5)
    rng, found = np.random.default_rng(1), []
    for _ in range(count):
        order = rng.permutation(rows)
        found += [tiny.pick(examples, order[at : at + 4].tolist()) for at in range(0, rows, 4)]
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_teacher_cache_resume_with_empty_cache_bit_identical(dtype):
    whole = started(model(), TeacherCache(ROOM, dtype))
    for number, batch in enumerate(epochs()):
        if number == 5:
            saved = jax.tree.map(np.array, whole.state)
        whole.train(batch)
    assert whole.read_metrics()["teacher_cache/hit_rate"] == pytest.approx(2 / 3)
    for settings in (TeacherCache(ROOM, dtype), TeacherCache(6000, dtype)):
        again = trainer.Trainer(
            whole.model,
            jax.tree.map(jnp.array, saved),
            whole.partitioner,
            KEY,
            teacher_cache=settings,
        )
        again._train_step = whole._train_step  # the same program
        for batch in epochs()[5:]:
            again.train(batch)
        assert bits(again.state.trainable) == bits(whole.state.trainable)
        full = again.read_metrics()["teacher_cache/examples"] == 12
        assert full == (settings.max_bytes == ROOM)


def test_teacher_cache_training_matches_no_cache():
    made = [started(model(), cache, 2) for cache in (None, TeacherCache(ROOM, "float32"))]
    for batch in epochs():
        for each in made:
            each.train(batch)
    tiny.close(made[1].state.trainable, made[0].state.trainable, 1e-5)
    found = [each.read_metrics() for each in made]
    own = {f"teacher_cache/{name}" for name in ("examples", "gigabytes", "hit_rate")}
    assert found[1].keys() - found[0].keys() == own
    tiny.close({name: found[1][name] for name in found[0]}, found[0], 1e-5)


@pytest.mark.slow
def test_teacher_cache_held_absent_rows_match_no_cache():
    runs = Runs([f"task_{row}" for row in range(12)])
    held = lambda: model(runs=runs, optimizer_def=tiny.optimizer(absent_tasks="hold"))  # noqa: E731
    made = [started(held(), cache) for cache in (None, TeacherCache(ROOM, "float32"))]
    for rows in ([3, 3, 7], [11, None, 7], [3, 3, 7]):
        for each in made:
            each.train(tiny.batch(rows, seed=sum(filter(None, rows))))
    tiny.close(made[1].state.trainable, made[0].state.trainable, 1e-5)
    assert made[1].read_metrics()["teacher_cache/hit_rate"] == pytest.approx(3 / 9)


@pytest.mark.slow
@pytest.mark.devices(8)
@pytest.mark.parametrize("num_partitions", [1, 4])
def test_teacher_cache_mesh_matches_one_device(num_partitions):
    found = lambda: model(config=tiny.config(num_heads=8))  # noqa: E731
    meshes = [PjitPartitioner(devices=jax.devices()[:1]), PjitPartitioner(num_partitions)]
    # Two microbatches of four rows: on eight shards a forward pass of teachers has eight.
    made = [started(found(), TeacherCache(ROOM, "float32"), 2, mesh) for mesh in meshes]
    for seed in (0, 1, 0):
        for each in made:
            each.train(tiny.batch([0, 1, 2, 1, 0, 2, 2, None], seed=seed))
    tiny.close(
        jax.device_get(made[1].state.trainable), jax.device_get(made[0].state.trainable), 1e-5
    )


# --- Compute -------------------------------------------------------------------------------------


def test_teacher_cache_stored_rows_do_not_run_teachers(monkeypatch):
    cache, add = opened(model(), TeacherCache(ROOM, "float32"), num_microbatches=2)
    rows = calls(cache, monkeypatch)
    first = add(BATCH)
    assert rows == [4, 4] and len(cache) == 8
    mirrored = add(tiny.pick(BATCH, range(7, -1, -1)))
    assert rows == [4, 4]
    for name in TEACHER_FEATURES:
        np.testing.assert_array_equal(mirrored[name], first[name][::-1])
    other = tiny.batch([1, 1], seed=7)
    mixed = {name: np.concatenate([value[2:], other[name]]) for name, value in BATCH.items()}
    assert add(mixed)["teacher_logits"].shape == (8, tiny.TARGET, tiny.VOCABULARY)
    assert rows == [4, 4, 4] and len(cache) == 10


def test_teacher_cache_repeated_row_computed_once(monkeypatch):
    cache, add = opened(model(), TeacherCache(ROOM))
    rows = calls(cache, monkeypatch)
    found = add(tiny.pick(BATCH, [0, 3, 0, 0]))
    assert (rows, len(cache)) == ([4], 2)
    np.testing.assert_array_equal(found["teacher_logits"][0], found["teacher_logits"][3])


def test_teacher_cache_step_has_no_third_forward_pass():
    def operations(made):
        return made.lower(BATCH)["train"].cost_analysis()["flops"]

    without = operations(started(tiny.model()))
    plain = operations(started(model()))
    cached = operations(started(model(), TeacherCache(ROOM, "float32")))
    # A forward pass beside one forward and one backward, which makes no gradient of weights.
    assert plain > 1.3 * without
    assert cached < 1.1 * without


def test_teacher_cache_key_covers_teacher_text_target_and_length():
    cache, add = opened(model(), TeacherCache(ROOM))
    one = tiny.batch([0], seed=3)
    add(one)
    assert len(cache) == 1
    changed = []
    for side in ("encoder", "decoder"):
        ids = f"{side}_{'input' if side == 'encoder' else 'target'}_tokens"
        at = np.flatnonzero(one[ids][0])[0]
        other = one[ids].copy()
        other[0, at] += 1
        changed.append(one | {ids: other})
    changed.append(one | {"encoder_task_ids": np.where(one["encoder_task_ids"] == 0, 1, 0)})
    changed.append(tiny.batch([0], seed=3) | {k: v[:, :-1] for k, v in one.items() if "deco" in k})
    for number, batch in enumerate(changed):
        add({name: value.astype(one[name].dtype) for name, value in batch.items()})
        assert len(cache) == number + 2


# --- Memory --------------------------------------------------------------------------------------


def positions(batch) -> tuple[int, int]:
    """Encoder and target positions that rows use."""
    real = (batch["encoder_input_tokens"] > 0) | (batch["encoder_prompt_slots"] > 0)
    return int(real.sum()), int(batch["decoder_loss_weights"].sum())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        # Each objective and each dtype.
        pytest.param(name, dtype, marks=[] if (row + column) % 2 else pytest.mark.slow)
        for row, name in enumerate(OBJECTIVES)
        for column, dtype in enumerate(teacher_cache.DTYPES)
    ],
)
def test_needed_bytes_matches_held_bytes(name, dtype):
    found = model(OBJECTIVES[name], config=tiny.config(num_decoder_layers=2))
    cache, add = opened(found, TeacherCache(ROOM, dtype))
    add(BATCH)
    encoder, decoder = positions(BATCH)
    held = sum(value.nbytes for row in cache._held.values() for value in row.values())
    assert cache.held_bytes == held
    assert needed_bytes(found, dtype, 8, encoder / 8, decoder / 8) == held


def test_teacher_cache_memory_growth_matches_held_bytes():
    """As counted by Python's allocator, with rows so large that bookkeeping does not matter."""
    found = model(config=tiny.config(vocab_size=20_000))
    cache, add = opened(found, TeacherCache(ROOM))
    add(BATCH)
    before = cache.held_bytes
    fresh = tiny.batch([0, 1, 2, 0, 1, 2, 0, 1], seed=8)
    tracemalloc.start()
    add(fresh)
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert cache.held_bytes - before > 500_000
    assert grown == pytest.approx(cache.held_bytes - before, rel=0.05)


def test_needed_bytes_paper_mixture():
    """As in docs/performance.md: (T + L) H + L V values of two bytes."""
    base = model(config=t5_config("t5_1_0_base"))
    one = needed_bytes(base, "bfloat16", 1, 191, 4)
    assert one == 2 * ((191 + 4) * 768 + 4 * 32_128) == 556_544
    assert needed_bytes(base, "bfloat16", 1_151_093, 191, 4) == pytest.approx(0.64e12, rel=0.01)


def test_teacher_cache_full_adds_no_more_examples(caplog):
    found = model()
    each = needed_bytes(found, "float32", 1, tiny.PROMPT + tiny.TEXT, tiny.TARGET)
    cache, add = opened(found, TeacherCache(3 * each, "float32"))
    plain = opened(found, TeacherCache(ROOM, "float32"))[1]
    with caplog.at_level("INFO"):
        for seed in range(3):
            batch = tiny.batch([0, 1, 2, 0], seed=seed)
            for name, value in plain(batch).items():
                np.testing.assert_array_equal(add(batch)[name], value)
    assert 3 <= len(cache) <= 5 and 2 * each < cache.held_bytes <= 3 * each
    messages = [
        record.getMessage() for record in caplog.records if "cache is full" in record.message
    ]
    assert len(messages) == 1 and f"holds {len(cache)} examples" in messages[0]
    assert any("an example of the first batch takes" in record.message for record in caplog.records)


def test_teacher_cache_metrics_report_size_and_hit_rate():
    cache, add = opened(model(), TeacherCache(ROOM))
    assert cache.metrics() == {"teacher_cache/examples": 0, "teacher_cache/gigabytes": 0}
    add(BATCH)
    add(BATCH)
    found = cache.metrics()
    assert found["teacher_cache/hit_rate"] == 0.5 and found["teacher_cache/examples"] == 8
    assert found["teacher_cache/gigabytes"] == cache.held_bytes / 1e9
    add(BATCH)
    assert cache.metrics()["teacher_cache/hit_rate"] == 1.0


# --- Errors --------------------------------------------------------------------------------------


def test_teacher_cache_packed_rows_error():
    made = started(model(), TeacherCache(ROOM))
    packed = tiny.pack(BATCH, [[0, 1], [3, 4, 5]])
    with pytest.raises(ValueError, match="cannot hold packed rows"):
        made.train(packed)
    with pytest.raises(ValueError, match="cannot hold packed rows"):
        made.lower(packed)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (lambda: tiny.model(), "no distillation"),
        (
            lambda: model(Distillation(logits=False, hidden=False, prompt_distance=True)),
            "prompt_distance compares prompts",
        ),
        (lambda: model(labels=encoder_decoder.LAYER_NORMS), "norm/scale is trainable"),
    ],
)
def test_teacher_cache_unsuitable_objective_error(found, message):
    with pytest.raises(ValueError, match=message):
        started(found(), TeacherCache(ROOM))


def test_teacher_cache_independent_runs_error():
    found = model(runs=Runs(["alpha", "beta"], groups="independent"))
    state = tiny.state(found, tiny.params(found))
    with pytest.raises(ValueError, match="independent runs"):
        trainer.Trainer(
            found,
            state,
            PjitPartitioner(),
            KEY,
            rows_by_run=True,
            teacher_cache=TeacherCache(ROOM),
        )


def test_teacher_cache_several_processes_error(monkeypatch):
    found = model()
    state, partitioner = tiny.state(found, tiny.params(found)), PjitPartitioner()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="this job has 2 processes"):
        TeacherCache(ROOM).open(found, state, partitioner)


@pytest.mark.parametrize(
    ("settings", "message"),
    [((0,), "be positive, got 0"), ((ROOM, "float16"), "dtype must be one of")],
)
def test_teacher_cache_settings_out_of_range_error(settings, message):
    with pytest.raises(ValueError, match=message):
        TeacherCache(*settings)
