"""Plans from the real TPU compiler, on a machine without TPUs.

Counts are compared with closed forms derived from the shapes, and with the compiler's counts.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks import plan_table
from mpt_jax.backbones.t5 import T5Config
from mpt_jax.core.runs import Runs
from mpt_jax.data.datasets import DatasetConfig
from mpt_jax.data.feature_converter import PromptFeatureConverter
from mpt_jax.plan import __main__ as command_module
from mpt_jax.plan import chips, format, hlo, steps
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.training.optimizers import PromptOptimizer
from mpt_jax.training.partitioning import PjitPartitioner
from mpt_jax.training.schedules import Schedule
from mpt_jax.training.trainer import Trainer
from tests.fixtures import tiny
from tests.fixtures.planned_jobs import read_jobs
from tests.fixtures.processes import run_python

ROOT = Path(__file__).resolve().parents[2]
NEEDS_LIBTPU = "libtpu, the TPUs' compiler, is not installed (pip install 'mpt-jax[tpu]')"
# Large enough that matrix products dominate, small enough to compile in seconds.
CONFIG = T5Config(
    vocab_size=2048, emb_dim=512, num_heads=8, head_dim=64, mlp_dim=2048,
    num_encoder_layers=2, num_decoder_layers=2, logits_via_embedding=True, dtype="bfloat16",
)  # fmt: skip
ROWS, PROMPT, TEXT, TARGET = 16, 64, 192, 16  # rows per chip


@pytest.fixture(autouse=True, scope="module")
def as_compiled_outside_tests(optimized):
    """Compiles with optimizations, because plans count optimized programs."""


@pytest.fixture
def libtpu():
    pytest.importorskip("libtpu", reason=NEEDS_LIBTPU)


# --- Counting ------------------------------------------------------------------------------------


def counted(function, *shapes) -> hlo.Cost:
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return hlo.cost(text_of(jax.jit(function).lower(*arrays)))


def text_of(lowered) -> str:
    text = lowered.compile().as_text()
    assert text is not None
    return text


def chain(x, kernels):
    for kernel in kernels:
        x = jnp.tanh(x @ kernel)
    return x


def scanned(x, kernels):
    return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]


def test_hlo_cost_loop_is_multiplied_by_trips():
    kernels, x = (7, 96, 96), (64, 96)
    apart = counted(lambda x, k: chain(x, [k[i] for i in range(7)]), x, kernels)
    loop = counted(scanned, x, kernels)
    assert apart.flops == loop.flops == 7 * 2 * 64 * 96 * 96
    assert loop.unknown_loops == 0


def test_hlo_cost_sliced_array_counts_slice():
    loop = counted(scanned, (64, 96), (100, 96, 96))
    floats = 100 * (96 * 96 + 3 * 64 * 96)  # a kernel, and x in and out of product and tanh
    # If whole kernels were counted, they would be 100 times as large.
    assert 0.5 * 4 * floats < loop.hbm_bytes < 3 * 4 * floats


def test_hlo_cost_unknown_loop_uses_given_trips():
    def until_small(x, kernel):
        return jax.lax.while_loop(lambda x: jnp.sum(x) > 1, lambda x: jnp.tanh(x @ kernel), x)

    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 96), (96, 96))]
    text = text_of(jax.jit(until_small).lower(*arrays))
    once = hlo.cost(text)
    assert once.flops == 2 * 64 * 96 * 96 and once.unknown_loops == 1
    assert hlo.cost(text, unknown_trips=5).flops == 5 * once.flops


@pytest.mark.devices(8)
def test_hlo_cost_counts_collectives_by_kind():
    mesh = jax.make_mesh((8,), ("data",))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=rows)
    whole = jax.NamedSharding(mesh, jax.P())
    found = hlo.cost(text_of(jax.jit(lambda x: x.sum(0), out_shardings=whole).lower(x)))
    assert found.collectives == {"all-reduce": (1, 32 * 4)}
    found = hlo.cost(text_of(jax.jit(lambda x: x * 2, out_shardings=whole).lower(x)))
    assert found.collectives == {"all-gather": (1, 64 * 32 * 4)}


def test_hlo_cost_collective_start_counts_results():
    text = """
ENTRY %main (p: f32[8,128], q: f32[64]) -> f32[8,128] {
  %p = f32[8,128]{1,0} parameter(0)
  %q = f32[64]{0} parameter(1)
  %permuted = (f32[8,128]{1,0}, f32[8,128]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%p), source_target_pairs={{0,1}}
  %summed = (f32[8,128]{1,0}, f32[64]{0}) all-reduce-start(%p, %q), to_apply=%add
  %gathered = ((f32[8,128]{1,0}, f32[64]{0}), (f32[32,128]{1,0}, f32[256]{0})) \
all-gather-start(%p, %q), dimensions={0}
  ROOT %done = f32[8,128]{1,0} collective-permute-done(%permuted)
}
"""
    assert hlo.cost(text).collectives == {
        "collective-permute": (1, 4 * 8 * 128),
        "all-reduce": (1, 4 * (8 * 128 + 64)),
        "all-gather": (1, 4 * (32 * 128 + 256)),
    }


ASYNCHRONOUS = """
%gathering (p: f32[8,128]) -> f32[32,128] {
  %p = f32[8,128]{1,0} parameter(0)
  ROOT %whole = f32[32,128]{1,0} all-gather(%p), dimensions={0}
}

%multiplying (a: f32[16,32], b: f32[32,64]) -> f32[16,64] {
  %a = f32[16,32]{1,0} parameter(0)
  %b = f32[32,64]{1,0} parameter(1)
  ROOT %product = f32[16,64]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: f32[8,128], y: f32[16,32], z: f32[32,64]) -> f32[32,128] {
  %x = f32[8,128]{1,0} parameter(0)
  %y = f32[16,32]{1,0} parameter(1)
  %z = f32[32,64]{1,0} parameter(2)
  %s = ((f32[8,128]{1,0}), f32[32,128]{1,0}, u32[]) async-start(%x), calls=%gathering
  %t = ((f32[16,32]{1,0}, f32[32,64]{1,0}), f32[16,64]{1,0}) async-start(%y, %z), calls=%multiplying
  %u = ((f32[8,128]{1,0}), f32[32,128]{1,0}, u32[]) async-update(%s), calls=%gathering
  %v = f32[16,64]{1,0} async-done(%t), calls=%multiplying
  %w = (f32[16,64]{1,0}, u32[], token[]) send(%v, %token), channel_id=1
  ROOT %done = f32[32,128]{1,0} async-done(%u), calls=%gathering
}
"""


def test_hlo_cost_asynchronous_operation_counts_once():
    found = hlo.cost(ASYNCHRONOUS)
    assert found.collectives == {"all-gather": (1, 4 * 32 * 128), "send": (1, 4 * 16 * 64)}
    assert found.flops == 2 * 16 * 32 * 64
    gathered, multiplied = 4 * (8 * 128 + 32 * 128), 4 * (16 * 32 + 32 * 64 + 16 * 64)
    sent = 2 * 4 * 16 * 64  # read, and the buffer it is in
    assert found.accessed_bytes == pytest.approx(gathered + multiplied + sent, abs=8)


# --- The steps, for TPUs -------------------------------------------------------------------------


def job(config: T5Config, rows: int) -> steps.Job:
    runs = Runs(["alpha"])
    converter = functools.partial(PromptFeatureConverter, prompt_length=PROMPT, runs=runs)
    rates = {"task": Schedule(0.3, decay="constant")}
    model = tiny.model(
        runs,
        PromptTuning(prompt_length=PROMPT),
        config,
        optimizer_def=PromptOptimizer(learning_rates=rates),
        feature_converter_cls=converter,
    )
    lengths = {"inputs": TEXT, "targets": TARGET}
    cfg = DatasetConfig("alpha", lengths, "train", rows, shuffle=False, seed=0)
    return steps.Job(model, cfg, cfg, Trainer, PjitPartitioner().logical_axis_rules)


def closed_form_flops(c: T5Config) -> float:
    """Operations of a training step on one chip: matrix products, forward and backward."""
    t, n, d, h, b = PROMPT + TEXT, c.num_heads, c.head_dim, c.emb_dim, ROWS
    mlp = (len(c.mlp_activations) + 1) * h * c.mlp_dim
    encoder = b * t * (4 * h * n * d + mlp)  # and as much back, to the input
    encoder_scores = b * n * t * t * d  # two products forward; back five, the scores again
    decoder = b * TARGET * (8 * h * n * d + mlp)  # no keys and values of the memory
    memory_scores = b * n * TARGET * t * h
    own_scores = b * n * TARGET * TARGET * d
    head = b * TARGET * h * c.vocab_size
    total = c.num_encoder_layers * (2 * encoder + 7 * encoder_scores)
    total += c.num_decoder_layers * (2 * decoder + 7 * memory_scores + 6 * own_scores) + 2 * head
    return 2.0 * total


def closed_form_arguments(c: T5Config) -> float:
    """Bytes of the backbone in bfloat16, the prompt with two moments, and the batch."""
    attention = 4 * c.emb_dim * c.num_heads * c.head_dim
    mlp = (len(c.mlp_activations) + 1) * c.emb_dim * c.mlp_dim
    backbone = c.vocab_size * c.emb_dim + c.num_encoder_layers * (attention + mlp)
    backbone += c.num_decoder_layers * (2 * attention + mlp)
    return 2 * backbone + 3 * 4 * PROMPT * c.emb_dim + 4 * ROWS * (3 * (PROMPT + TEXT) + 4 * TARGET)


@pytest.fixture(scope="module")
def planned():
    """Function from `scan` (layers in a loop) to the cost of a training step, compiled once."""
    pytest.importorskip("libtpu", reason=NEEDS_LIBTPU)

    @functools.cache
    def needs(scan: bool):
        config = dataclasses.replace(CONFIG, scan_layers=scan)
        choice = steps.MeshLayout("v5e:2x2")
        return steps.compile_steps(job(config, 4 * ROWS), choice, ["train"])[0]

    return needs


@pytest.mark.slow
def test_step_cost_matches_closed_form(planned):
    needs = planned(False)
    assert needs.cost.flops == pytest.approx(closed_form_flops(CONFIG), rel=0.05)
    assert needs.arguments == pytest.approx(closed_form_arguments(CONFIG), rel=0.05)
    assert needs.num_chips == 4 and needs.rows == ROWS and needs.fits


@pytest.mark.slow
def test_accessed_bytes_with_loops_use_own_count(planned):
    apart, loop = planned(False), planned(True)
    assert apart.cost.loops == 0 and loop.cost.loops == 4  # encoder, decoder, and back
    assert apart.accessed_bytes == apart.compiler["bytes accessed"]
    assert loop.accessed_bytes == loop.cost.accessed_bytes > loop.compiler["bytes accessed"]
    # The compiler's rules are not known exactly.
    assert apart.cost.accessed_bytes == pytest.approx(apart.accessed_bytes, rel=0.25)
    # A loop stacks what the backward pass needs, and reads it from the stack.
    assert apart.accessed_bytes < loop.accessed_bytes < 2 * apart.accessed_bytes
    assert apart.cost.hbm_bytes < apart.accessed_bytes


@pytest.mark.slow
def test_step_cost_scanned_layers_same_flops(planned):
    apart, loop = planned(False), planned(True)
    assert loop.cost.flops == pytest.approx(apart.cost.flops, rel=0.05)
    assert loop.compiler["flops"] < 0.8 * apart.compiler["flops"]  # once


@pytest.mark.slow
def test_step_cost_only_prompt_gradients_cross_chips(planned):
    needs = planned(False)
    # The gradient of the prompt, and a few sums for the log.
    moved = sum(size for _, size in needs.cost.collectives.values())
    assert set(needs.cost.collectives) == {"all-reduce"}
    assert moved < 2 * 4 * PROMPT * CONFIG.emb_dim
    assert sorted(needs.cost.kernels) == [
        "memory_backward_kernel", "memory_forward_kernel", "self_backward_kernel",
        "self_forward_kernel",
    ]  # fmt: skip


@pytest.mark.slow
def test_compile_steps_v6e_with_model_axis(libtpu):
    choice = steps.MeshLayout("v6e:2x2", model_axis=2)
    train, evaluated, predict = steps.compile_steps(job(CONFIG, 4 * ROWS), choice)
    assert train.rows == 2 * ROWS
    # Twice the rows on half of the model each, except the part that each chip computes fully.
    assert train.cost.flops == pytest.approx(closed_form_flops(CONFIG), rel=0.05)
    assert evaluated.cost.flops < train.cost.flops / 1.5
    assert predict.cost.unknown_loops == 1
    text = format.table([train, evaluated, predict])
    assert "| v6e:2x2 | 2 x 2 |" in text and text.count("\n") == 4
    assert "the smallest slice tried that fits is v6e:2x2" in format.verdicts([train])
    written = json.loads(json.dumps(format.as_json([train], job(CONFIG, 8))))
    assert written[0]["compute_seconds"] == pytest.approx(train.cost.flops / 918e12)


def test_from_json_reads_what_as_json_wrote_and_damage_raises():
    counts = hlo.Cost(2.0, 3.0, 4.0, {"all-reduce": (1, 8.0)}, {"kernel": (1, 2.0, 3.0)}, 1, 0)
    choice, compiler = steps.MeshLayout("v5e:2x2"), {"flops": 1.0}
    cost = steps.StepCost("train", choice, 4, 8.0, 1, 2, 3, counts, compiler, 0.5)
    (record,) = json.loads(json.dumps(format.as_json([cost], job(CONFIG, 8))))
    assert format.from_json(record) == cost
    for damage, message in (
        ({"peak": None}, "has peak = null, but an integer was expected"),
        ({"cost": {**record["cost"], "kernels": []}}, "has cost.kernels = "),
        ({"choice": {}}, "choice lacks topology"),
    ):
        with pytest.raises(ValueError, match=f"^The record of a plan .*{message}.*plan --json"):
            format.from_json({**record, **damage})
    with pytest.raises(ValueError, match="it lacks peak"):
        format.from_json({name: x for name, x in record.items() if name != "peak"})


@pytest.mark.slow
def test_compile_steps_too_large_step_does_not_fit(libtpu):
    wide = dataclasses.replace(CONFIG, mlp_dim=1 << 21, num_encoder_layers=6)
    (found,) = steps.compile_steps(job(wide, 4), steps.MeshLayout("v5e:2x2"), ["train"])
    assert not found.fits
    text = format.table([found]) + format.verdicts([found])
    assert "does not fit" in text and "none of the layouts tried fits" in text


def test_compile_steps_indivisible_batch_raises(libtpu):
    with pytest.raises(
        ValueError, match="batch size of the train step, 6, .* by 4, the number of copies"
    ):
        steps.compile_steps(job(CONFIG, 6), steps.MeshLayout("v5e:2x2"), ["train"])


@pytest.mark.slow
def test_compile_steps_several_slices_use_mesh_shapes(libtpu):
    small = dataclasses.replace(CONFIG, num_encoder_layers=1, num_decoder_layers=1)
    two = dataclasses.replace(
        job(small, 4 * ROWS), ici_mesh_shape=(1, 2, 2), dcn_mesh_shape=(2, 1, 1)
    )
    (needs,) = steps.compile_steps(
        two, steps.MeshLayout("v5e:2x2", 2, slices=two.slices), ["train"]
    )
    assert needs.num_chips == 8 and needs.rows == ROWS
    assert "| 2 of v5e:2x2 | 4 x 2 |" in format.table([needs])
    # Only prompt-sized gradients cross slices; the model's sums stay inside a slice.
    sends, crossing = needs.cost.collectives[hlo.ACROSS_SLICES]
    inside = sum(b for kind, (_, b) in needs.cost.collectives.items() if kind != hlo.ACROSS_SLICES)
    assert sends >= 1 and crossing < 4 * 4 * PROMPT * CONFIG.emb_dim < inside
    assert needs.ici_seconds == pytest.approx(inside / 200e9)
    with pytest.raises(ValueError, match="needs 2 slices of 4 devices.* has 2 slices of 8"):
        steps.compile_steps(two, steps.MeshLayout("v5e:2x4", 2, slices=2), ["train"])


def test_topologies_expand_chip_names():
    assert chips.topologies("v5e:4x4") == ["v5e:4x4"]
    assert chips.topologies("v6e")[:2] == ["v6e:2x2", "v6e:2x4"]
    with pytest.raises(ValueError, match="Unknown TPU 'v9'.*v5e"):
        chips.topologies("v9:2x2")
    with pytest.raises(ValueError, match="--topology=v5e:4 by 4 has the invalid shape '4 by 4'"):
        chips.topologies("v5e:4 by 4")


def test_plan_table_figures_follow_from_counts_and_chips():
    """Derived figures are updated without compiling, if a chip's peaks are corrected."""
    path = ROOT / "docs" / "benchmarks" / "plan.json"
    found = json.loads(path.read_text())
    kept = json.loads(path.read_text())
    plan_table.derive(found)
    assert found == kept, "run: python -m benchmarks.plan_table"
    v6e = [row["needs"] for row in found.values() if row["topology"].startswith("v6e")]
    for needs in v6e:  # 1,638 GB/s
        assert needs["accessed_seconds"] == pytest.approx(needs["accessed_bytes"] / 1638e9)
    assert len(v6e) == 4
    rows = plan_table.ordered(found)
    assert len(rows) == len(plan_table.ROWS)
    assert plan_table.table(rows) in (ROOT / "docs" / "tpu-planning.md").read_text()


# --- Search for a slice --------------------------------------------------------------------------


def asked(*topologies: str, **lists: list[str]) -> types.SimpleNamespace:
    """The command's flags."""
    flags = {"num_partitions": [], "num_microbatches": [], "steps": ["train", "predict"]}
    return types.SimpleNamespace(topology=list(topologies), **(flags | lists))


@pytest.fixture
def compiled(monkeypatch) -> list[steps.MeshLayout]:
    """Replaces compilation. A step has 60 GiB of arguments, divided by the model axis, and 1 GiB of
    temporaries for each of a copy's rows, of which there are 64 in total."""
    chosen = []

    def compile_steps(job, choice, names):
        chosen.append(choice)
        copies = choice.slices * chips.count(choice.topology) // choice.model_axis
        if 64 % copies:
            raise ValueError(f"64 rows do not divide over {copies} copies")
        arguments = 60 * chips.GIB // choice.model_axis
        temporaries = 64 * chips.GIB // copies
        return [
            steps.StepCost(
                name, choice, copies * choice.model_axis, 64 / copies, arguments, temporaries,
                arguments + temporaries, hlo.Cost(), {"flops": 0.0, "bytes accessed": 1.0}, 0.0,
            )
            for name in names
        ]  # fmt: skip

    monkeypatch.setattr(steps, "compile_steps", compile_steps)
    return chosen


def test_plan_search_ends_at_smallest_slice_that_fits(compiled):
    """v6e has 32 GiB: 60 / 4 + 64 / copies GiB, with 1, 2, 4 copies on slices of 4, 8, 16."""
    found = command_module.plan(job(CONFIG, 64), asked("v6e", num_partitions=["4"]))
    assert [choice.topology for choice in compiled] == ["v6e:2x2", "v6e:2x4", "v6e:4x4"]
    assert [each.fits for each in found] == [False] * 4 + [True] * 2
    assert "the smallest slice tried that fits is v6e:4x4." in format.verdicts(found)


def test_plan_search_several_layouts_ends_when_all_fit(compiled):
    found = command_module.plan(job(CONFIG, 64), asked("v6e", num_partitions=["4", "2"]))
    # A model axis of 2 fits where 30 + 64 / copies is at most 32 GiB: on 32 copies, so 64 chips.
    assert compiled[-1] == steps.MeshLayout("v6e:8x8", 2) and len(compiled) == 2 * 5
    assert "the smallest slice tried that fits is v6e:4x4." in format.verdicts(found)


def test_plan_search_without_fit_shows_all_slices(compiled):
    found = command_module.plan(job(CONFIG, 64), asked("v5e"))
    assert not any(each.fits for each in found)
    assert "v5e: none of the layouts tried fits." in format.verdicts(found)
    assert compiled[-1].topology == "v5e:8x16", "64 rows are not divisible by 128 copies"


def test_plan_search_mesh_shapes_select_slices_of_their_size(compiled):
    shapes = {"ici_mesh_shape": (1, 4, 4), "dcn_mesh_shape": (2, 1, 1)}
    two = dataclasses.replace(job(CONFIG, 64), **shapes)
    command_module.plan(two, asked("v6e"))
    assert compiled == [steps.MeshLayout("v6e:4x4", 4, None, 2)]
    with pytest.raises(ValueError, match=r"needs slices of 6 chips, .* v6e have 4, 8, 16"):
        odd = dataclasses.replace(two, ici_mesh_shape=(1, 3, 2))
        command_module.plan(odd, asked("v6e"))
    with pytest.raises(ValueError, match="--num_partitions=2 would have no effect, .*4, 4"):
        command_module.plan(two, asked("v6e", num_partitions=["2"]))


def test_read_job_takes_mesh_shapes_from_gin():
    names = ("ici_mesh_shape", "dcn_mesh_shape")
    bindings = [
        f"partitioning.PjitPartitioner.{name} = {shape}"
        for name, shape in zip(names, ["(1, 4, 2)", "(4, 1, 1)"], strict=True)
    ]
    files = ["gin/mpt_source.gin", "gin/tiny.gin"]
    shaped, plain = read_jobs((files, bindings), (files, []))
    assert shaped == [[1, 4, 2], [4, 1, 1], 4, 300]  # TRAIN_STEPS of tiny.gin
    assert plain == [None, None, 1, 300]


# --- The command ---------------------------------------------------------------------------------


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    settings = {"JAX_PLATFORMS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    return run_python("-m", "mpt_jax.plan", *arguments, check=False, timeout=600, **settings)


@pytest.mark.slow
def test_plan_command_compiles_gin_file(libtpu, tmp_path):
    found = command(
        "--gin_file=gin/mpt_source.gin", "--gin_file=gin/tiny.gin", "--gin.BATCH_SIZE=48",
        "--topology=v5e:2x2", "--steps=train", "--num_microbatches=1,2",
        "--gin.partitioning.PjitPartitioner.num_partitions=2",
        f"--json={tmp_path / 'plan.json'}",
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.count("| v5e:2x2 | 2 x 2 |") == 2
    assert "fastest layout tried" in found.stdout
    assert found.stdout.count(" ms x 300 steps = ") == 2
    one, two = json.loads((tmp_path / "plan.json").read_text())
    assert one["cost"]["flops"] == pytest.approx(two["cost"]["flops"], rel=0.05)


LOAD = """
import sys
from mpt_jax.plan import chips
print(len(chips.devices("v5e:2x2")), flush=True)
sys.stdin.read()
"""


def test_share_libtpu_two_processes_load_at_once(libtpu):
    """Both processes keep it loaded until both have loaded it."""
    environment = {k: v for k, v in os.environ.items() if k != "ALLOW_MULTIPLE_LIBTPU_LOAD"}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    children = [
        subprocess.Popen(
            [sys.executable, "-c", LOAD], cwd=ROOT, env=environment, text=True, **pipes
        )
        for _ in range(2)
    ]
    loaded = [child.stdout.readline() for child in children]
    errors = [child.communicate("")[1] for child in children]
    assert loaded == ["4\n", "4\n"], errors


@pytest.mark.slow
def test_plan_command_missing_argument_fails():
    found = command("--gin_file=gin/mpt_source.gin")
    assert found.returncode == 2 and "--topology is missing" in found.stderr
    found = command("--gin_file=gin/mpt_sauce.gin", "--topology=v5e:2x2")
    assert found.returncode == 2 and "gin/mpt_source.gin" in found.stderr


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--steps=train,evaluate", "must be a list of steps out of train, eval, predict"),
        pytest.param(
            *("--num_partitions=x", "--num_partitions=['x']: must be a list of positive numbers"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("--num_microbatches=0", "--num_microbatches=['0']: must be a list of positive"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_plan_command_wrong_value_of_flag_fails(flag, message):
    found = command("--gin_file=gin/mpt_source.gin", "--topology=v5e:2x2", flag)
    assert found.returncode == 1 and message in found.stderr + found.stdout
