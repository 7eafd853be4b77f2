"""The network, its checkpoints, and the frozen models that features are extracted with."""
