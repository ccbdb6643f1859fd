"""SeqIO task suites. Importing a suite's module registers its tasks."""
