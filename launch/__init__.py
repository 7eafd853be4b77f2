"""Entry points: train, sample and the demo."""
