"""Fallback for `python -m t5x.train`: runs `mpt_jax.train` instead."""

import runpy

from mpt_jax.config import trainer_choice

if __name__ == "__main__":
    trainer_choice.announce_own()
    runpy.run_module("mpt_jax.train", run_name="__main__", alter_sys=True)
