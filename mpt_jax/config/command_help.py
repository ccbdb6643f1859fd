"""Help of train, eval, infer and plan: their flags and the most commonly set macros."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from absl import flags

WIDTH = 100
# docs/configuration.md has the same ten, and a test compares them.
MACROS = {
    "TARGET_TASKS": "tasks of a target stage; each is an independent run unless GROUPS = 'joint'",
    "TRAIN_STEPS": "length of training",
    "BATCH_SIZE": "examples per step; in a target stage per run",
    "LEARNING_RATE": "peak of the schedule; MPT's factors have TASK_LEARNING_RATE",
    "STAGE": "name of the run's folder: ROOT/STAGE is the MODEL_DIR",
    "INITIAL_CHECKPOINT_PATH": "the backbone: a Hugging Face folder, a T5X or an Orbax checkpoint",
    "VOCABULARY": "the SentencePiece model of that backbone",
    "T5_NAME": "the configuration of a T5X checkpoint; a Hugging Face folder has its own",
    "TASK_FEATURE_LENGTHS": "limits on inputs and targets in tokens, without the prompt",
    "INITIAL_ARTIFACT": "the prompt artifact to start from, with START_FROM",
}
EXAMPLE = {
    "train": "gin/mpt_target.gin --gin_file=gin/tiny.gin --gin.TARGET_TASKS=\"['toy_rte']\"",
    "eval": "gin/eval.gin --gin_file=gin/methods/mpt.gin --gin_file=gin/tiny.gin",
    "infer": "gin/infer.gin --gin_file=gin/methods/mpt.gin --gin_file=gin/tiny.gin",
    "plan": "gin/mpt_source.gin --topology=v5e:4x4",
}


def is_asked(argv: Sequence[str]) -> bool:
    """Whether a command line asks for help."""
    return any(argument in ("-h", "-help", "--help") for argument in argv[1:])


def usage(entry: str, modules: Sequence[str]) -> str:
    """Returns the help of an entry point.

    Args:
        entry: `'train'`, `'eval'`, `'infer'` or `'plan'`.
        modules: the names of the modules that define its flags.
    """
    known = flags.FLAGS.flags_by_module_dict()
    defined = [flag for module in modules for flag in known.get(module, [])]
    rows = [("--gin.NAME=VALUE", "Binds a macro or a parameter to a Python value.")]
    rows += [(f"--{flag.name}", _with_default(flag)) for flag in defined]
    parts = [
        f"usage: python -m mpt_jax.{entry} --gin_file=FILE [--gin_file=FILE ...] [flags]",
        f"example: python -m mpt_jax.{entry} --gin_file={EXAMPLE[entry]}",
        "Flags:",
        *_columns(rows),
        "Macros people set most, as --gin.NAME=VALUE (all of them: docs/macros.md):",
        *_columns(list(MACROS.items())),
        "--helpfull also lists the flags of absl, JAX and other libraries.",
    ]
    return "\n".join(parts)


def _with_default(flag: flags.Flag) -> str:
    default = "" if flag.default in (None, [], False) else f" Default: {flag.default_as_str}."
    help_text, _, _ = str(flag.help).partition(";\n")  # absl adds how a flag is repeated
    return f"{help_text}{default}"


def _columns(rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    lines = []
    for name, text in rows:
        first, *rest = textwrap.wrap(text, WIDTH - width - 4)
        lines += [f"  {name:{width}}  {first}", *(f"  {'':{width}}  {line}" for line in rest)]
    return lines
