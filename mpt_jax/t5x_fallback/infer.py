"""`python -m t5x.infer` without T5X: `python -m mpt_jax.infer`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("mpt_jax.infer", run_name="__main__", alter_sys=True)
