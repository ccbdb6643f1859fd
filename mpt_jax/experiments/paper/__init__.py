"""Tables of the MPT paper and of this project, run on the paper's data or on the toy suite.

variants.py     the methods and ablations
suites.py       the tasks that correspond to the paper's, and their training lengths
tables.py       the variants, tasks, numbers of examples and seeds of each table
chains.py       the stages that produce the results of a table, in order
published.py    the paper's figures, read from published.toml
format.py       text tables of our results and the paper's figures
"""
