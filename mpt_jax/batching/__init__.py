"""Construction of NumPy batches: tokenizers, collation, packing and length buckets."""
