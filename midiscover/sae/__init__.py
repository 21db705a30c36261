"""Sparse autoencoders in pure torch: architectures, losses, folding, metrics, checkpoints. No storage, no Ray."""
