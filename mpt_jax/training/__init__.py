"""State, optimizer, step, trainer, mesh and teacher cache."""
