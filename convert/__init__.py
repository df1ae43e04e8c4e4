"""From the original TensorFlow checkpoints, or the community's PyTorch copy, to the one file, and
back."""
