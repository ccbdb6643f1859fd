"""Search, parsing and checks of gin files, and the choice of the module `t5x`."""
