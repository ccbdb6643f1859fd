"""`mpt-jax <command>`: runs the module of a command, as `python -m` does."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence

from mpt_jax.runtime.exits import exit_if_unread

COMMANDS = {
    "train": "train a stage: --gin_file=gin/mpt_source.gin ...",
    "eval": "score a checkpoint or an artifact: --gin_file=gin/eval.gin ...",
    "infer": "write predictions: --gin_file=gin/infer.gin ...",
    "predict": "answer requests that each name a task: --prompts DIR... --input file.jsonl",
    "export": "save predict and score for use without MPT-JAX: --prompts DIR... --out FOLDER",
    "tasks": "list all tasks, or show NAME -n 3: their text as the model reads it",
    "demo": "train teachers, source stage and new tasks of the toy suite; --full for all of it",
    "paper": "run a table of the MPT paper or of ours, on the paper's tasks or the toy suite",
    "doctor": "check whether a stage can start on this machine: --suite toy, --json",
    "gin-path": "print the folder of the gin files, for T5X's --gin_search_paths",
    "plan": "compile a stage for TPUs without having any: --gin_file=... --topology=v5e:4x4",
    "report": "write an HTML page of a demo, a table or one run: DIR",
    "convert": "convert backbones and prompts (Hugging Face, T5X, PEFT, NumPy): SOURCE TARGET",
    "verify-weights": "compare this network with transformers' on the same weights: FOLDER",
}


# Modules of commands, below mpt_jax; the other commands are modules of mpt_jax itself.
MODULES = {
    "predict": "serving.predict",
    "export": "serving.export",
    "tasks": "cli.tasks",
    "doctor": "cli.doctor",
    "gin-path": "cli.gin_path",
    "demo": "experiments.demo",
    "paper": "experiments.paper",
    "report": "experiments.report",
    "verify-weights": "convert.verify",
}

# Commands that import modules of the user from the working directory, as `python -m` does. The
# others read files from elsewhere, and must not run a Python file of that folder.
WITH_USER_MODULES = ("train", "eval", "infer", "plan", "tasks", "doctor")


def main() -> None:
    """Runs the command that the first argument names. The command parses the other arguments."""
    try:
        try:
            _main(sys.argv[1:])
        finally:
            sys.stdout.flush()
    except BrokenPipeError as error:
        exit_if_unread(error)
        raise


def _main(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0] not in COMMANDS:
        lines = [f"  {name:16}{help_text}" for name, help_text in COMMANDS.items()]
        usage = "\n".join(["usage: mpt-jax <command> [arguments]", *lines])
        if arguments and arguments[0] in ("-h", "--help"):
            print(usage)
            return
        unknown = (
            f"mpt-jax: unknown command {arguments[0]!r}. Use one of the commands below.\n"
            if arguments
            else ""
        )
        sys.exit(unknown + usage)
    sys.argv = [f"mpt-jax {arguments[0]}", *arguments[1:]]
    module = MODULES.get(arguments[0], arguments[0])
    if arguments[0] in WITH_USER_MODULES:
        sys.path.insert(0, os.getcwd())
    runpy.run_module(f"mpt_jax.{module}", run_name="__main__", alter_sys=True)
