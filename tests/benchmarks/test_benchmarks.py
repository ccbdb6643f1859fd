"""Parts of the benchmarks: counts, comparisons, and short runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import seqio
import tensorflow as tf

from benchmarks import (
    chunked_losses,
    contest,
    figures,
    fleet,
    images,
    positions,
    ragged,
    ragged_batches,
    ragged_mix,
    scaling,
    starts,
    tune_crosspt,
)
from benchmarks.contestants import Ours, Peft, t5
from mpt_jax.backbones.clip import CLIPConfig, ImageTowerConfig, TextTowerConfig
from mpt_jax.batching.collate import Batch, Example
from mpt_jax.core.tree import flatten
from mpt_jax.data import sampling
from mpt_jax.experiments.paper import suites
from mpt_jax.training.state import param_shapes
from tests.fixtures.processes import run_python

ROOT = Path(__file__).resolve().parents[2]
P = 5


def examples(count: int = 12, seed: int = 1) -> list[Example]:
    return ragged_mix.examples(ragged_mix.draw(count, seed), vocabulary=512)


# --- The mix -------------------------------------------------------------------------------------


def test_ragged_mix_has_paper_sizes_and_rates() -> None:
    assert ragged_mix.CAP == sampling.T5_CAP
    # Five epochs over these are the steps of gin/mpt_source.gin at its batch of 32.
    total = sum(task.examples for task in ragged_mix.TASKS)
    stage = (ROOT / "gin/mpt_source.gin").read_text()
    assert f"{total:,} examples" in stage
    assert f"TRAIN_STEPS = {5 * (total // 32)}" in stage
    shares = dict(zip((t.name for t in ragged_mix.TASKS), ragged_mix.rates(), strict=True))
    assert shares["mnli"] == shares["qqp"] == pytest.approx(262_144 / (2 * 262_144 + 395_545))


def test_ragged_mix_draws_stated_lengths() -> None:
    mix = ragged_mix.draw(20_000, seed=3)
    for k, task in enumerate(ragged_mix.TASKS[:4]):  # few of these exceed the limit
        assert mix.inputs[mix.tasks == k].mean() == pytest.approx(task.mean, rel=0.03)
    assert mix.inputs.max() == ragged_mix.TEXT_LIMIT
    assert mix.targets.max() == ragged_mix.TARGET_LIMIT
    found = ragged_mix.description(mix)["histogram"]
    assert sum(found["all"]) == 20_000
    by_task = [found[task.name] for task in ragged_mix.TASKS]
    np.testing.assert_array_equal(np.sum(by_task, axis=0), found["all"])


def test_ragged_mix_same_seed_same_examples() -> None:
    assert examples(seed=4) == examples(seed=4) != examples(seed=5)


# --- Counting positions --------------------------------------------------------------------------


def test_next_fit_matches_seqio_packing() -> None:
    mix = ragged_mix.draw(300, seed=2)
    lengths, room = positions.needs(mix, 20), positions.capacity(20, 1.5)
    data = tf.data.Dataset.from_generator(
        lambda: (
            {"inputs": np.ones(t, np.int32), "targets": np.ones(n, np.int32)} for t, n in lengths
        ),
        output_signature={n: tf.TensorSpec([None], tf.int32) for n in ("inputs", "targets")},
    )
    limits = dict(zip(("inputs", "targets"), room, strict=True))
    rows = seqio.utils.trim_and_pack_dataset(data, limits, use_custom_ops=False)
    assert positions.next_fit(lengths, room) == sum(1 for _ in rows)


def test_positions_short_and_long_texts_match_hand_count() -> None:
    mix = ragged_mix.Mix(np.zeros(4, int), np.array([10, 90, 20, 100]), np.full(4, 2))
    exact = lambda n: n  # noqa: E731
    assert positions.in_batches(mix.inputs, positions.unsorted(4, 2), exact) == 2 * 90 + 2 * 100
    order = iter([np.array([0, 2]), np.array([1, 3])])
    assert positions.in_batches(mix.inputs, order, positions.to_multiple(32)) == 2 * 32 + 2 * 128
    lengths = positions.needs(mix, 0)
    # One open row: 10 + 90 fill it, 20 starts the next, and 100 does not fit into that.
    assert positions.next_fit(lengths, (110, 16)) == 3
    assert positions.best_fit(lengths, (110, 16), window=4) == 2 + 0
    assert positions.best_fit(lengths, (110, 16), window=2) == 1 + 2
    # Targets also close a row.
    assert positions.next_fit(lengths, (1000, 4)) == 2


def test_positions_no_method_is_below_ideal() -> None:
    found = positions.count(ragged_mix.draw(256), 20)
    ideal = found["ideal: no padding at all"]
    assert min(found.values()) == ideal
    assert found["padded to the limit"] == 276
    text = positions.markdown({20: found})
    assert "| ideal: no padding at all | " in text
    assert text.count("\n") == len(found) + 1


# --- Batches of several kinds --------------------------------------------------------------------


def texts_in(batches: list[Batch]) -> list[tuple[int, ...]]:
    """Returns the text of every example in batches: the tokens from slot P to the next zero."""
    found = []
    for batch in batches:
        tokens, slots = batch["encoder_input_tokens"], batch["encoder_prompt_slots"]
        for row in range(len(tokens)):
            for start in np.flatnonzero(slots[row] == P) + 1:
                end = start
                while end < tokens.shape[1] and tokens[row, end] != 0:
                    end += 1
                found.append(tuple(tokens[row, start:end].tolist()))
    return sorted(found)


@pytest.mark.parametrize("kind", ragged_batches.KINDS)
def test_ragged_batches_every_kind_has_every_example_once(kind: str) -> None:
    given = examples()
    made = ragged_batches.KINDS[kind](given, P, 4)
    assert texts_in(made) == sorted(tuple(example.inputs) for example in given)
    assert sum(int(batch["decoder_loss_weights"].sum()) for batch in made) == sum(
        len(example.targets) for example in given
    )
    if kind.startswith(("packed", "padded")):
        assert len({batch["encoder_input_tokens"].shape for batch in made}) == 1


def test_ragged_batches_dynamic_padding_has_longest_length() -> None:
    given = [Example(range(3, 3 + n), [4, 1]) for n in (7, 2, 9, 3)]
    shapes = lambda made: [b["encoder_input_tokens"].shape for b in made]  # noqa: E731
    assert shapes(ragged_batches.longest_unsorted(given, P, 2)) == [(2, P + 7), (2, P + 9)]
    assert shapes(ragged_batches.longest_sorted(given, P, 2)) == [(2, P + 3), (2, P + 9)]
    assert shapes(ragged_batches.bucketed(given, P, 2)) == [(2, P + 32)] * 2
    assert ragged_batches.positions(ragged_batches.longest_unsorted(given, P, 2)) == 2 * (
        7 + 9 + 2 * P
    )


def test_needed_flops_match_hand_count() -> None:
    config = t5("tiny")
    model = Ours(config, P, 1).trainer.model
    kernels = {n: x.size for n, x in flatten(param_shapes(model)[0]).items() if "kernel" in n}
    crossing = "encoder_decoder_attention/key", "encoder_decoder_attention/value"
    by_input = sum(
        n
        for name, n in kernels.items()
        if "encoder/" in name[:8] or any(c in name for c in crossing)
    )
    by_target = sum(kernels.values()) - by_input + config.vocab_size * config.emb_dim
    inputs, targets = P + 3, 2
    pairs = 2 * inputs**2 + 2 * targets * (inputs + targets)
    expected = 4 * (inputs * by_input + targets * by_target) + 12 * 32 * pairs
    example = Example([3, 4, 1], [5, 1])
    assert ragged_batches.needed_flops(config, [example], P) == expected
    assert ragged_batches.needed_flops(config, [example] * 3, P) == 3 * expected


# --- Contests ------------------------------------------------------------------------------------

WORKER = """
import sys, time
from benchmarks import contest
name, log = sys.argv[1:]
def run():
    with open(log, "a") as file:
        file.write(name)
    time.sleep(0.05 if name == "a" else 0.0)
contest.serve(lambda: contest.Work(run, lambda: 7.0), warm_ups=1)
"""


def test_contest_contestants_of_a_heat_take_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "waits.py").write_text(WORKER)
    log = tmp_path / "log"
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    commands = {name: ["waits", name, str(log)] for name in "abc"}
    found = contest.compare(commands, turns=3, together=2)
    # Warm-ups and turns of the first heat, then the next heat.
    assert log.read_text() == "ab" + "ab" * 3 + "c" + "c" * 3
    assert found["a"]["median_seconds"] >= 0.05 > found["b"]["median_seconds"]
    assert found["a"]["min_seconds"] <= found["a"]["median_seconds"] <= found["a"]["max_seconds"]
    assert found["b"]["peak_mib"] == 7.0
    assert len(found["c"]["all_seconds"]) == 3


def test_contest_failed_contestant_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dies.py").write_text("raise SystemExit(3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="exit code 3"):
        contest.compare({"one": ["dies"]}, turns=1)


def test_figures_table_is_markdown(tmp_path: Path) -> None:
    assert figures.table(["", "s"], [["one", 1.23456], ["two", 1234.5]]).splitlines() == [
        "|  | s |",
        "| --- | --- |",
        "| one | 1.23 |",
        "| two | 1,234 |",
    ]
    figures.write({"seconds": 1.5}, tmp_path / "a" / "b.json")
    assert json.loads((tmp_path / "a" / "b.json").read_text()) == {"seconds": 1.5}


# --- Steps ---------------------------------------------------------------------------------------


def settings(**changes: object) -> argparse.Namespace:
    return argparse.Namespace(
        **{"device": "cpu", "size": "tiny", "batches": 2, "contestants": None} | changes
    )


def test_ragged_work_turn_trains() -> None:
    args = settings()
    work = ragged.work(args, "source", 4, ragged.Contestant("MPT-JAX", "packed_2x"))
    work.run()
    assert work.peak_mib() > 0


def test_ragged_speedups_divide_ours_by_peft() -> None:
    found = {
        name: {"examples_per_second": speed}
        for name, speed in (("PEFT unsorted", 2.0), ("PEFT sorted", 4.0), ("MPT-JAX buckets", 6.0))
    }
    assert ragged.speedups(found) == {
        "MPT-JAX buckets / PEFT unsorted": 3.0,
        "MPT-JAX buckets / PEFT sorted": 1.5,
    }


def test_scaling_point_name_round_trips() -> None:
    for points in scaling.curves([1, 10], [0, 20]).values():
        for point in points:
            assert scaling.Point.of_name(point.name) == point
    packed = scaling.batch(scaling.Point(tasks=1000, packed=True), 512)
    assert len(np.unique(packed["encoder_task_ids"])) == scaling.B + 1  # and 0 for padding


def ours_loss(side: Ours, batches: list[Batch]) -> float:
    """Returns the mean cross entropy per target token over batches, at the initial parameters."""
    model, params = side.trainer.model, side.trainer.state.params
    sums = [model.loss_sums(params, jax.tree.map(jax.numpy.asarray, b))[0] for b in batches]
    tokens = sum(int(batch["decoder_loss_weights"].sum()) for batch in batches)
    return float(sum(s["cross_entropy"].sum() for s in sums)) / tokens


def copy_weights(ours: Ours, theirs: Peft) -> None:
    """Copies our parameters to PEFT's model."""
    from mpt_jax.convert import hf

    config = ours.trainer.model.module.config
    leaves = {n: np.array(x) for n, x in flatten(ours.trainer.state.params).items()}
    state = {
        name: leaves[n].T if n.endswith(("/kernel", "/rel_embedding")) else leaves[n]
        for n, name in hf.name_table(config).items()
    }
    as_tensors = lambda tree: {n: theirs.torch.tensor(x) for n, x in tree.items()}  # noqa: E731
    base = theirs.model.get_base_model()
    missing, unexpected = base.load_state_dict(as_tensors(state), strict=False)
    assert not unexpected
    assert set(missing) <= {
        f"{n}.weight" for n in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
    }
    prompt = {
        "embedding.weight": leaves["prompt/shared"][0],
        "prefix_task_cols": leaves["prompt/task_left"],
        "prefix_task_rows": leaves["prompt/task_right"],
    }
    theirs.model.prompt_encoder["default"].load_state_dict(as_tensors(prompt))


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("fused", [False, True])
def test_contestants_have_equal_losses(fused: bool) -> None:
    given, config = examples(6), t5("tiny")
    ours, theirs = Ours(config, P, len(ragged_mix.TASKS)), Peft(config, P, len(ragged_mix.TASKS))
    rng = np.random.default_rng(0)
    prompt = {
        n: rng.normal(size=x.shape).astype(np.float32)
        for n, x in ours.trainer.state.params["prompt"].items()
    }
    trainable = {"prompt": jax.tree.map(jax.numpy.asarray, prompt)}
    ours.trainer.state = ours.trainer.state.replace(trainable=trainable)
    copy_weights(ours, theirs)
    if fused:
        from benchmarks import fused_t5

        fused_t5.fuse_attention(theirs.model.get_base_model())
    (whole,) = ragged_batches.longest_unsorted(given, P, len(given))
    theirs.step(whole)  # its loss is computed before the update
    for kind in ragged_batches.KINDS:
        made = ragged_batches.KINDS[kind](given, P, len(given))
        assert ours_loss(ours, made) == pytest.approx(theirs.loss(), rel=1e-4), kind


def test_chunked_losses_contestants_have_equal_gradients() -> None:
    found = chunked_losses.compare("cross entropy and KL", 2, 128, 4_000, repeats=1)
    assert 0 < found["temporaries_ratio"] < 0.5
    assert found["largest_relative_difference"] < 1e-5
    assert "| cross entropy and KL | 128 | 4,000 |" in chunked_losses.table([found])


# --- Fleets --------------------------------------------------------------------------------------


def test_fleet_runs_have_requested_number() -> None:
    assert [run.name for run in fleet.fleet_runs(1)] == ["toy_boolq_k32_s0"]
    assert len({run.name for run in fleet.fleet_runs(64)}) == 64
    with pytest.raises(ValueError, match="multiples of 4"):
        fleet.fleet_runs(10)


def test_fleet_stages_single_runs_cycle_through_targets() -> None:
    jobs = fleet.stages("cold", 1, 200)
    first, second = next(jobs), next(jobs)
    assert (first.name, second.name) == ("cold_0", "cold_1")
    assert first.runs != second.runs
    assert len(first.runs) == 1
    assert len(next(fleet.stages("8", 8, 200)).runs) == 8


def test_fleet_comparisons_use_as_many_single_runs() -> None:
    row = lambda s, alone: {"median_seconds": s, "steps_alone_seconds": alone}  # noqa: E731
    found = {"cold": row(10.0, 2.0), "warm": row(3.0, 1.0), "8": row(12.0, 6.0)}
    one, eight = fleet.comparisons(found, [1, 8])
    assert one["fleet/cold"] == 1.0
    assert eight["cold"] == 80.0
    assert eight["fleet/warm"] == 0.5
    assert eight["warm_steps_alone"] == 8.0


# --- Command lines -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "field"),
    [
        ("positions --examples 256", "positions"),
        (
            "ragged --size tiny --batch-sizes 4 --batches 2 --turns 1 --stages target "
            "--contestants",
            "results",
        ),
        ("scaling --size tiny --banks 2 --lengths 3 --turns 1", "curves"),
        ("fleet --sizes 1 2 --steps 2 --turns 1", "comparisons"),
    ],
)
def test_benchmark_command_writes_figures(command: str, field: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    name, *arguments = command.split()
    if name == "ragged":
        arguments.append("MPT-JAX packed_1x")
    child = run_python("-m", f"benchmarks.{name}", *arguments, "--out", out)
    assert "| --- |" in child.stdout
    assert json.loads(out.read_text())[field]


# --- Learning rates of ATTEMPT and CrossPT -------------------------------------------------------


def test_tune_crosspt_uses_reserved_tasks_and_draws() -> None:
    tried = list(tune_crosspt.grid())
    stages = [tune_crosspt.stage(variant, rates) for variant, rates in tried]
    assert len({stage.name for stage in stages}) == len(stages)
    tasks = {run.task for stage in stages for run in stage.runs}
    assert not tasks & set(suites.TOY.tasks.values())
    assert {run.seed for stage in stages for run in stage.runs} == set(tune_crosspt.SEEDS)
    for variant in {variant.name: variant for variant, _ in tried}.values():
        assert suites.TOY.rates[variant.rate] in [
            rates for other, rates in tried if other is variant
        ]
    bound = dict(binding.split(" = ", 1) for binding in stages[-1].bindings)
    # Two tasks of a seed form a group of CrossPT, with four rows of each task in a step.
    assert (bound["GROUPS"], bound["BATCH_SIZE"]) == ("[0, 0, 1, 1, 2, 2, 3, 3, 4, 4]", "8")
    assert bound["infer_eval/utils.DatasetConfig.split"] == "'validation'"


def test_starts_row_means_over_tasks_and_artifacts() -> None:
    """Source tasks without labels have no ranked score; a start may leave out the targets."""
    (own, average, *_) = starts.STARTS
    scores = {task: {"accuracy": 50.0, "rank_accuracy": 70.0} for task in average.tasks}
    scores |= {task: {"f1": 20.0} for task in ("toy_squad", "toy_record")}
    more = {**scores, "toy_boolq": {"accuracy": 100.0, "rank_accuracy": 95.0}}
    found = [
        {"start": start.name, "scores": {task: each[task] for task in start.tasks}}
        for start in (own, average)
        for each in (scores, more)
    ]
    assert starts.row(own, found) == [own.name, "40.0", "70.0", "", "", 2]
    # Ten target scores of 50 (ranked 70), of which one is 100 (95).
    assert starts.row(average, found) == [average.name, "40.0", "70.0", "55.0", "72.5", 2]


def test_best_of_says_that_the_best_is_at_the_edge_of_a_grid():
    inside = figures.best_of({0.01: 50.0, 0.1: 60.0, 1.0: 40.0})
    assert inside == "Best: 0.1 (60.00)."
    for scores in ({0.01: 61.0, 0.1: 60.0}, {0.01: 59.0, 0.1: 60.0}):
        assert figures.best_of(scores).endswith("at the edge of the grid: extend it.")


# --- Images --------------------------------------------------------------------------------------


def small_clip() -> CLIPConfig:
    """A CLIP with room for the benchmark's texts; its activation is one that transformers has."""
    image = ImageTowerConfig(
        num_layers=2, emb_dim=24, num_heads=3, mlp_dim=40, patch_size=4, image_size=16
    )
    text = TextTowerConfig(
        num_layers=2, emb_dim=16, num_heads=2, mlp_dim=36, vocab_size=60,
        context_length=images.LENGTH,
    )  # fmt: skip
    return CLIPConfig(image=image, text=text, joint_dim=10)


@pytest.mark.parametrize("method", images.METHODS)
def test_images_step_trains_only_the_prompt(method: str) -> None:
    config = small_clip()
    ours, made = images.Ours(method, config), images.batch(config)
    before, loss = ours.prompt(), ours.loss(made)
    rows = images.CONTEXT if method == "coop" else 2 * images.TOKENS
    assert before.shape == (rows, 16 if method == "coop" else 24)
    assert list(flatten(ours.trainer.state.trainable)) == [
        "prompt/text_context/table" if method == "coop" else "prompt/image_tokens/table"
    ]
    for _ in range(5):
        ours.step(made)
    assert np.abs(ours.prompt() - before).max() > 0 and ours.loss(made) < loss


def test_images_texts_reserve_the_context() -> None:
    config = small_clip()
    for context in (0, images.CONTEXT):
        texts = images.texts(config, context)
        assert texts.context_length == context and (texts.slots.max(1) == context).all()
        assert (texts.eot > context).all() and (texts.eot < images.LENGTH).all()


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
def test_images_contestants_take_the_same_steps() -> None:
    """Losses before and after two steps; with another prompt in torch, the check fails."""
    differences = images.check(small_clip())
    assert set(differences) == {"coop", "vpt"} and max(differences.values()) < 1e-4
    with pytest.raises(ValueError, match="The losses of coop differ by .*: not the same step."):
        images.check(small_clip(), tolerance=0.0)
