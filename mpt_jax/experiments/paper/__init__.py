"""The MPT paper's tables: runs on the paper's data or the toy suite, compared with its figures.

variants.py     the methods and ablations
suites.py       the tasks that correspond to the paper's, and how long they train
tables.py       the variants, tasks, examples and seeds of each table
chains.py       the chains of stages behind a table
published.py    the paper's figures (published.toml)
format.py       a table of our results and the paper's figures
"""
