"""`python -m t5x.eval` without T5X: `python -m mpt_jax.eval`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("mpt_jax.eval", run_name="__main__", alter_sys=True)
