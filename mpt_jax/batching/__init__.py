"""Examples to batches in NumPy: collation, packing, length bucketing and tokenizers."""
