"""Saving and restoring a run, with checksums, fingerprint and lock."""
