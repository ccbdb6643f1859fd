"""Train state, optimizer, steps, trainer, mesh and teacher cache."""
