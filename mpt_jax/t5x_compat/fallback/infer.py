"""Fallback for `python -m t5x.infer`: runs `mpt_jax.infer` instead."""

import runpy

from mpt_jax.config import trainer_choice

if __name__ == "__main__":
    trainer_choice.announce_own()
    runpy.run_module("mpt_jax.infer", run_name="__main__", alter_sys=True)
