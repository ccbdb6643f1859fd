"""The trained model: backbone, prompt method, losses and decoding."""
