"""`python -m t5x.train` without T5X: `python -m mpt_jax.train`."""

import runpy

from mpt_jax import t5x_import

if __name__ == "__main__":
    t5x_import.announce_own()
    runpy.run_module("mpt_jax.train", run_name="__main__", alter_sys=True)
