"""TinyFlux-Deep: precache, stream, train and sample a compact rectified-flow transformer."""

__version__ = "0.1.0"
