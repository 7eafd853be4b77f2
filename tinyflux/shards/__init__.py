"""The contract between precaching and training: shard format, stores, the plan and the stream."""
