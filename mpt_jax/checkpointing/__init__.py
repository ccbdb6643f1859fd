"""Saving and restoring of a job, with checksums, configuration fingerprint and run lock."""
