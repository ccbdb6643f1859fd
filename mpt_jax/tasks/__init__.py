"""SeqIO task suites. Importing a module of this package registers its tasks."""
