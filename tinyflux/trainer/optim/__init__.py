"""Optimizers of sharded parameters."""
