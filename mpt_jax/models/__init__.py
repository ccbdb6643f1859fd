"""What a trainer drives: backbone, prompt method and losses together, and decoding."""
