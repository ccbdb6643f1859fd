"""The MPT paper's tables: their runs, on its own data or on the toy suite, and ours beside theirs.

variants.py     the methods and ablations
suites.py       which tasks stand for the paper's, how long they train
tables.py       which variants, tasks, examples and seeds make a table
chains.py       the chains of stages behind a table
published.py    the paper's figures (published.toml)
format.py       a table of what was run, beside them
"""
