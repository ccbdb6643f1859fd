"""The MPT paper's tables: their runs, on its own data or on the toy suite, and ours beside theirs.

arms.py         the methods and ablations, as chains of stages
suites.py       which tasks stand for the paper's, how long they train
tables.py       which arms, tasks, examples and seeds make a table
published.py    the paper's figures (published.toml)
show.py         a table of what was run, beside them
"""
