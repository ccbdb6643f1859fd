"""Methods on images, each a chain of stages: teachers, a source stage and a target stage.

Prompts adapt by MVLPT's target recipe (gin/mvlpt_target.gin, gin/clip_mpt_target.gin).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mpt_jax.experiments.paper.variants import Source, Variant

TARGET, MPT_TARGET = "gin/mvlpt_target.gin", "gin/clip_mpt_target.gin"
CACHE = "gin/runs/image_cache.gin"  # for methods without image tokens
CLIP, CLASSIFIER = "gin/models/prompted_clip.gin", "gin/models/clip_classifier.gin"
COOP, VPT, UPT, BOTH, COCOOP, MPT = (
    f"gin/methods/{name}.gin" for name in ("coop", "vpt", "upt", "coop_vpt", "cocoop", "clip_mpt")
)
SHOTS = 20  # training images of each class in a source stage, as in gin/mvlpt_source.gin

SQUASH = "IMAGE_MODE = 'squash'"  # as the target stages' gin files; evaluation has the default

ZERO_SHOT = Variant("zero-shot", (), "gin/methods/zero_shot.gin", bindings=(SQUASH,), model=CLIP)
PROBE = Variant(
    "linear probe",
    ("gin/linear_probe.gin", CACHE),
    "gin/methods/linear_probe.gin",
    bindings=(SQUASH,),
    rate="linear_probe",
    model=CLASSIFIER,
)


def source_row(task: str, draw: int) -> str:
    """Returns the name of a row of a source stage's artifact."""
    return f"{task}_k{SHOTS}_per_class_s{draw}"


def _target(
    name: str, method: str, source: Source | None = None, *bindings: str, **rest
) -> Variant:
    """Returns a variant that starts from a source stage, or from initial values without one."""
    cached = (CACHE,) if method in (COOP, COCOOP) else ()
    return Variant(
        name,
        (TARGET, method, *cached),
        method,
        source,
        (SQUASH, *bindings),
        model=CLIP,
        **{"rate": f"{'m' if source else ''}{Path(method).stem}", **rest},
    )


def _joint(name: str, method: str, *bindings: str, draws: int = 3) -> Source:
    """Returns MVLPT's source stage: one prompt for all source tasks, in each draw."""
    return Source(f"mvlpt_source_{name}", ("gin/mvlpt_source.gin", method), bindings, draws=draws)


COOP_VARIANT = _target("CoOp", COOP)
VPT_VARIANT = _target("VPT", VPT)
UPT_VARIANT = _target("UPT", UPT)
SINGLE = (COOP_VARIANT, VPT_VARIANT, UPT_VARIANT)
MCOOP, MVPT, MUPT = MULTITASK = tuple(
    _target(name, method, _joint(folder, method))
    for name, method, folder in (
        ("MCoOp", COOP, "coop"),
        ("MVPT", VPT, "vpt"),
        ("MUPT", UPT, "upt"),
    )
)
COCOOP_VARIANT = _target("CoCoOp", COCOOP)

TEACHERS = Source("clip_pt_source", ("gin/clip_pt_source.gin",), draws=1)
# Teachers have prompts at both sites. Bindings that leave only those of a method's site.
_OTHER_SITE = {
    COOP: ("sites.SitePrompts.image_tokens = None",),
    VPT: ("sites.SitePrompts.text_context = None",),
}


def from_task(task: str) -> tuple[Variant, ...]:
    """Returns the variants that start from the prompt of one task of the table, which was trained
    on that task alone."""
    return tuple(
        _target(
            f"{single.name} from {task}",
            single.method,
            Source(
                f"single_{single.rate}",
                (TEACHERS.files[0], single.method),
                _OTHER_SITE.get(single.method, ()),
                draws=1,
                of_targets=True,
            ),
            start=task,
            rate=single.rate,
        )
        for single in SINGLE
    )


# --- What the parts of MVLPT do ------------------------------------------------------------------

_AS_UPT = ("CONTEXT_LENGTH = 4", "IMAGE_TOKENS = 4")
# How the context and the image tokens are coupled, in both stages.
COUPLINGS = (
    _target(
        "MUPT, mixing none", UPT, _joint("upt_none", UPT, "MIXING = 'none'"), "MIXING = 'none'"
    ),
    _target("M(CoOp + VPT)", BOTH, _joint("coop_vpt", BOTH, *_AS_UPT), *_AS_UPT),
)
UNION = _target("MUPT, union softmax", UPT, _joint("upt_union", UPT, "CLASS_SOFTMAX = 'union'"))
# Targets start from one draw of the source stage, instead of from the mean over three.
ONE_DRAW = tuple(
    dataclasses.replace(MUPT, name=f"MUPT from draw {number}", draw=number) for number in (1, 2, 3)
)

# --- MPT on CLIP ---------------------------------------------------------------------------------

NO_DISTILLATION = "DISTILLATION = None"
ONLY_TEXT = ("IMAGE_PROMPT = None",)
ONLY_IMAGE = ("TEXT_PROMPT = None", "CONTEXT_LENGTH = 0")


def _mpt(
    name: str,
    folder: str = "",
    *bindings: str,
    both: Sequence[str] = (),
    teachers: Source | None = None,
) -> Variant:
    """Returns MPT on CLIP. `bindings` are those of the source stage only, `both` of both stages."""
    source = Source(
        "_".join(filter(None, ("clip_mpt_source", folder))),
        ("gin/clip_mpt_source.gin",),
        (*bindings, *both),
        teachers,
        draws=1,
    )
    return Variant(name, (MPT_TARGET,), MPT, source, (SQUASH, *both), "clip_mpt", model=CLIP)


MPT_VARIANT = _mpt("MPT", teachers=TEACHERS)
MPT_ZERO_SHOT = _mpt("MPT, zero-shot teacher", "zero_shot", "DISTILL_FROM = 'zero_shot'")
MPT_ALONE = _mpt("MPT, no distillation", "alone", NO_DISTILLATION)
MPT_SITES = (
    _mpt("MPT, text, no distillation", "text", NO_DISTILLATION, both=ONLY_TEXT),
    _mpt("MPT, image, no distillation", "image", NO_DISTILLATION, both=ONLY_IMAGE),
)
MPT_LAYERS = tuple(
    _mpt(
        f"MPT, {kind} layers, no distillation",
        kind,
        NO_DISTILLATION,
        both=(f"LAYER_FACTORS = '{kind}'",),
    )
    for kind in ("each", "tied")
)
MPT_ONES = _mpt(
    "MPT, factors start at 1, no distillation",
    "ones",
    NO_DISTILLATION,
    "INIT_FACTORS = @init.ones",
)
# Baselines of MPT: one shared prompt, and one prompt per source task, averaged for the target.
SHARED = _target("shared prompt", BOTH, _joint("shared", BOTH, draws=1))
PER_TASK = _target("mean of prompts per task", BOTH, TEACHERS)
SCRATCH_BOTH = _target("CoOp + VPT", BOTH)

# --- MULTI-LANE ----------------------------------------------------------------------------------


def _lanes(name: str, *bindings: str, files: Sequence[str] = (), **rest) -> Variant:
    stage = "gin/multilane.gin"
    return Variant(name, (stage, *files), "gin/methods/multi_lane.gin", bindings=bindings, **rest)


def lanes(classes: int, selectors: tuple[int, ...], merged: int, rows: int) -> tuple[Variant, ...]:
    """Returns MULTI-LANE and variants of it.

    Args:
        classes: the number of classes of a sequence.
        selectors: other numbers of selectors than the default.
        merged: the number of tokens that are merged in place of selectors.
        rows: the number of examples per step if all tasks are trained at once, a multiple of their
            number.
    """
    return (
        _lanes("MULTI-LANE"),
        *(
            _lanes(f"{number} selector{'s' if number > 1 else ''}", f"SELECTORS = {number}")
            for number in selectors
        ),
        _lanes("merged tokens", "SELECTORS = 0", f"MERGED_TOKENS = {merged}"),
        _lanes("no drop and replace", "DROP_AND_REPLACE = False"),
        _lanes("features not normalized", "NORMALIZE = False"),
        _lanes("loss over all classes", f"ALL_CLASSES = {classes}"),
        _lanes("lanes start from the mean", "sequence.start_from.mean = True"),
        _lanes(
            "all tasks at once",
            f"BATCH_SIZE = {rows}",
            files=("gin/runs/joint_lanes.gin",),
            joint=True,
        ),
    )
