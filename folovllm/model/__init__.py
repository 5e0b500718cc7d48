"""Checkpoints, and the network that is built from them."""
