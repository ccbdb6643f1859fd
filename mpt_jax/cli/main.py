"""`mpt-jax <command>`: a short name for `python -m mpt_jax.<command>`."""

from __future__ import annotations

import os
import runpy
import sys

COMMANDS = {
    "train": "train a stage: --gin_file=gin/mpt_source.gin ...",
    "eval": "score a checkpoint or an artifact: --gin_file=gin/eval.gin ...",
    "infer": "write predictions: --gin_file=gin/infer.gin ...",
    "predict": "answer requests that name a task each: --prompts DIR... --input file.jsonl",
    "export": "predict and score as files that JAX alone runs: --prompts DIR... --out FOLDER",
    "tasks": "list; show NAME -n 3: the tasks there are, and their text",
    "demo": "teachers, source stage and new tasks on the toy suite; --full for all of it",
    "paper": "runs a table of the MPT paper, on its tasks or the toy suite",
    "doctor": "what is wrong with this machine, and what mends it; --suite toy, --json",
    "plan": "what a stage needs on TPUs that are not here: --gin_file=... --topology=v5e:4x4",
    "report": "one HTML page of what a demo or a table left: DIR",
    "convert": "SOURCE TARGET: backbones and prompts between Hugging Face, T5X, PEFT and NumPy",
    "verify-weights": "FOLDER: our network beside transformers' on the same weights",
}


# Where a command's module lies, below mpt_jax; the others are at its top.
MODULES = {
    "predict": "serving.predict",
    "export": "serving.export",
    "tasks": "cli.tasks",
    "doctor": "cli.doctor",
    "demo": "experiments.demo",
    "paper": "experiments.paper",
    "report": "experiments.report",
    "verify-weights": "convert.verify",
}


def main() -> None:
    """Runs a command; everything after its name is that module's own."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] not in COMMANDS:
        lines = [f"  {name:16}{what}" for name, what in COMMANDS.items()]
        usage = "\n".join(["usage: mpt-jax <command> [arguments]", *lines])
        if arguments and arguments[0] in ("-h", "--help"):
            print(usage)
            return
        unknown = f"mpt-jax: unknown command {arguments[0]!r}\n" if arguments else ""
        sys.exit(unknown + usage)
    sys.argv = [f"mpt-jax {arguments[0]}", *arguments[1:]]
    module = MODULES.get(arguments[0], arguments[0])
    sys.path.insert(0, os.getcwd())  # as `python -m` does, for task suites that lie there
    runpy.run_module(f"mpt_jax.{module}", run_name="__main__", alter_sys=True)
