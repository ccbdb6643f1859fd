"""Fallback for `python -m t5x.eval`: runs `mpt_jax.eval` instead."""

import runpy

from mpt_jax.config import trainer_choice

if __name__ == "__main__":
    trainer_choice.announce_own()
    runpy.run_module("mpt_jax.eval", run_name="__main__", alter_sys=True)
