"""The modules that `import t5x` finds where T5X is not installed.

T5X is on no package registry, so a gin file that says `from t5x import utils` would not run on
most machines. These modules answer to the names our gin files, and T5X's own run files, use,
with this library's objects. Each only re-exports. A real T5X, wheel or editable, always wins.
"""
