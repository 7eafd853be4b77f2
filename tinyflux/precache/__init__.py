"""Precaching: images and captions -> shards of latents, text states and teacher features."""
