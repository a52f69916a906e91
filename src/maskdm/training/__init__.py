"""The training loop and what it keeps: optimizer, moving average, checkpoints, metrics."""
