"""Shared helpers: rectified-flow algebra, timestep buckets, counter-based randomness, files, settings, errors."""
