"""The commands that build, check and share shards."""
