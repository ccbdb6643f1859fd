"""`python -m mpt_jax.cli <command>`: the `mpt-jax` command."""

from mpt_jax.cli.main import main

if __name__ == "__main__":
    main()
