"""Precaching: from images and captions to shards, and the tools around them."""
