"""The network, its checkpoints, and the frozen models for feature extraction."""
