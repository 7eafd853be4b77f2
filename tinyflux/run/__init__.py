"""What a run leaves on disk: checkpoints, metrics, the report, uploads."""
