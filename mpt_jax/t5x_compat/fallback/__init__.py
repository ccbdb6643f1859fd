"""Modules that `import t5x` finds if T5X is not installed.

T5X is on no package registry, so a gin file with `from t5x import utils` would fail on most
machines. These modules provide the names that this library's gin files and T5X's run files use,
with this library's objects. They only re-export. A real T5X, wheel or editable, always wins.
"""
