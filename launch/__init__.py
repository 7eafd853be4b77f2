"""The commands that train, sample and evaluate, and the demo."""
