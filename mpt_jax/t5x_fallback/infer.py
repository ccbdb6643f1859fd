"""`python -m t5x.infer` without T5X: `python -m mpt_jax.infer`."""

import runpy

from mpt_jax import t5x_import

if __name__ == "__main__":
    t5x_import.announce_own()
    runpy.run_module("mpt_jax.infer", run_name="__main__", alter_sys=True)
