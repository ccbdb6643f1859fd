"""`python -m t5x.train` without T5X: `python -m mpt_jax.train`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("mpt_jax.train", run_name="__main__", alter_sys=True)
