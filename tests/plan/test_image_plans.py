"""Plans of image stages: stand-ins for missing files, and class texts divided over chips."""

from __future__ import annotations

import functools
import json

import pytest

from mpt_jax.backbones.clip import CLIPConfig, ImageTowerConfig, TextTowerConfig
from mpt_jax.batching import clip_tokenizer
from mpt_jax.core.runs import Runs
from mpt_jax.data.datasets import DatasetConfig
from mpt_jax.data.image_converter import PromptImageConverter
from mpt_jax.data.image_transforms import ImageTransform
from mpt_jax.data.task_lookup import find_task
from mpt_jax.models.class_texts import TaskClasses, class_texts
from mpt_jax.plan import stand_ins, steps
from mpt_jax.prompts.init import Normal
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.prompts.sites import SitePrompts
from mpt_jax.tasks import images
from mpt_jax.tasks.image_sets import coop, elevater
from mpt_jax.training.partitioning import PjitPartitioner
from mpt_jax.training.trainer import Trainer
from tests.fixtures import clip_files, tiny_clip, tiny_lanes
from tests.fixtures.processes import ROOT, run_command, run_script
from tests.fixtures.shared_data import shared

assert coop and elevater  # importing them registers tasks
NEEDS_LIBTPU = "libtpu, the TPUs' compiler, is not installed (pip install 'mpt-jax[tpu]')"


# --- Stand-ins -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [("2012 BMW M3 Coupe", 4 + 1 + 2 + 2), ("a photo of a hard-leaved.", 1 + 2 + 1 + 1 + 5)],
)
def test_estimated_tokenizer_counts_letters_and_digits(text, number):
    tokenizer = stand_ins.EstimatedTokenizer(100)
    assert len(tokenizer.encode(text)) == number
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (98, 99, 100)


def test_estimated_tokenizer_bounds_longest_names_of_suites(tmp_path):
    archive = shared("clip_bpe/bpe_simple_vocab_16e6.txt.gz")
    folder = clip_files.write(tmp_path / "clip", clip_files.published_merges(archive))
    clip = clip_tokenizer.ClipTokenizer.from_folder(folder)
    estimated = stand_ins.EstimatedTokenizer(clip.vocab_size)
    longest = {}
    for row in (*coop.SETS, *elevater.SETS):
        if row.name != "coop_imagenet":  # whose names are a file of CoOp
            names = row.classes.names()
            longest[row.name] = [
                max(len(x.encode(name)) for name in names) for x in (clip, estimated)
            ]
    assert len(longest) == 31
    assert all(real <= estimate <= 2.5 * real + 2 for real, estimate in longest.values()), longest
    # With a context of 16, start, '.' and end, both are padded to 40 positions.
    assert longest["coop_stanford_cars"] == [16, 19]


@pytest.mark.usefixtures("own_tasks")
def test_class_names_stand_in_only_for_suites(tmp_path):
    names = stand_ins.class_names(find_task("coop_imagenet_k1_per_class_s1"))
    assert len(names) == len(set(names)) == 1_000
    # The table of ucf101 is missing, but its names are known.
    assert stand_ins.class_names(find_task("coop_ucf101_k1_per_class_s1"))[0] == "Apply Eye Makeup"
    images.register("gone", images.FolderImages(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match="gone does not exist"):
        stand_ins.class_names(find_task("gone"))


READ = """
import json, sys
from mpt_jax.plan import __main__ as plan, stand_ins
job = plan.read_job([sys.argv[1]], json.loads(sys.argv[2]), [sys.argv[3]])
texts = job.model.texts
print(json.dumps([stand_ins.note(job.model), texts.tokens.shape, texts.context_length]))
"""


def read(file: str, tasks: list[str], tmp_path) -> list:
    bindings = json.dumps([f"TARGET_TASKS = {tasks}"])
    printed = run_script(READ, file, bindings, ROOT, MPT_JAX_ROOT=str(tmp_path))
    return json.loads(printed.splitlines()[-1])


def test_read_job_image_stage_without_any_file(tmp_path):
    runs = ["coop_imagenet_k1_per_class_s1", "coop_ucf101_k1_per_class_s1"]
    note, shape, context = read("gin/coop_target.gin", runs, tmp_path)
    assert context == 16
    # start, context, name, '.', end: the longest name is 'Handstand Pushups' or alike.
    names = stand_ins.class_names(find_task("coop_ucf101"))
    longest = max(len(stand_ins.EstimatedTokenizer(9).encode(name)) for name in names)
    assert shape == [1_101, -(-(16 + 3 + longest) // 8) * 8]
    assert f"at most {longest}. The 1,000 class names of {runs[0]} are not on this machine" in note
    assert f"of 5 tokens were used. Class texts have {shape[1]} positions each." in note
    assert runs[1] not in note


def test_note_text_model_is_empty():
    assert stand_ins.note(object()) == ""
    assert stand_ins.note(tiny_clip.model()) == ""


def test_note_lanes_name_stand_ins_without_texts():
    task = TaskClasses("many", stand_ins._names(4))
    made = tiny_lanes.model(tasks=(task,))
    says = "The 4 class names of many are not on this machine; stand-ins were used."
    assert stand_ins.note(made) == says


# --- Stages --------------------------------------------------------------------------------------

STAGES = ("mvlpt_source", "mvlpt_target", "clip_pt_source", "clip_mpt_source", "clip_mpt_target",
          "coop_target", "vpt_target", "multilane")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_plan_of_each_stage_has_its_memory_without_any_file(stage, tmp_path):
    """Of the toy image world; no earlier stage has run."""
    pytest.importorskip("libtpu", reason=NEEDS_LIBTPU)
    step = ["--gin.STEP=2"] if stage == "multilane" else []
    arguments = [f"--gin_file=gin/{stage}.gin", "--gin_file=gin/tiny_vision.gin", *step]
    arguments += ["--topology=v5e:2x2", "--steps=train,predict", f"--json={tmp_path / 'plan.json'}"]
    run_command("plan", *arguments, MPT_JAX_ROOT=str(tmp_path))
    found = json.loads((tmp_path / "plan.json").read_text())
    assert [x["step"] for x in found] == ["train", "predict"]
    for cost in found:  # the shipped CLIP has 3 MB, and its image tower 2 MB
        assert 2e6 < cost["arguments"] < cost["peak"] < 1e8 and cost["fits"]


# --- Class texts over chips ----------------------------------------------------------------------

TEXT = TextTowerConfig(
    num_layers=2, emb_dim=256, num_heads=4, mlp_dim=1024, vocab_size=512, context_length=40
)
IMAGE = ImageTowerConfig(
    num_layers=2, emb_dim=128, num_heads=2, mlp_dim=512, patch_size=16, image_size=32
)
CLASSES, CONTEXT, CHUNK, IMAGES = 256, 16, 16, 4  # images per chip


@pytest.fixture(autouse=True, scope="module")
def as_compiled_outside_tests(optimized):
    """Compiles with optimizations, because plans count optimized programs."""


@pytest.mark.slow
def test_step_cost_class_texts_are_divided_over_chips():
    pytest.importorskip("libtpu", reason=NEEDS_LIBTPU)
    config = CLIPConfig(image=IMAGE, text=TEXT, joint_dim=64, dtype="bfloat16")
    runs = Runs(["many"])
    tokenizer = stand_ins.EstimatedTokenizer(TEXT.vocab_size)
    task = TaskClasses("many", stand_ins._names(CLASSES))
    texts = class_texts([task], tokenizer, TEXT.context_length, CONTEXT)
    model = tiny_clip.model(
        SitePrompts(PromptTuning(CONTEXT, Normal())),
        runs,
        config=config,
        texts=texts,
        tokenizer=tokenizer,
        image_transform=ImageTransform(IMAGE.image_size),
        feature_converter_cls=functools.partial(PromptImageConverter, runs=runs),
        text_chunk=CHUNK,
    )
    cfg = DatasetConfig("many", {}, "train", 4 * IMAGES, shuffle=False, seed=0)
    job = steps.Job(model, cfg, None, Trainer, PjitPartitioner().logical_axis_rules)
    (needs,) = steps.compile_steps(job, steps.MeshLayout("v5e:2x2"), ["train"])
    length, width = texts.tokens.shape[1], TEXT.emb_dim
    layer = length * (4 * width * width + 2 * width * TEXT.mlp_dim)
    scores = 2 * length * length * width
    # Forward, forward again for the backward pass, and back to the input.
    text = 2 * TEXT.num_layers * (3 * layer + 4 * scores)
    image = 2 * IMAGE.num_layers * IMAGE.num_tokens * 12 * IMAGE.emb_dim**2
    expected = CLASSES / 4 * text + IMAGES * image
    assert needs.cost.flops == pytest.approx(expected, rel=0.1)
    # The weights of the text encoder are not saved for each of 16 chunks.
    weights = 2 * TEXT.num_layers * (4 * width * width + 2 * width * TEXT.mlp_dim)
    assert needs.temporaries < 4 * weights
