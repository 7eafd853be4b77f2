"""The offline zoo: real diffusers and transformers classes with small configs and weights."""
