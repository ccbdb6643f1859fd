"""Saving and restoring of a run, with checksums, configuration fingerprint and run lock."""
