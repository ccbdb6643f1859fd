"""Initial parameters, train state, optimizer, mesh, trainer, teacher cache and best steps."""
