"""The training loop, and the optimizer, averages, measurements and reports around it."""
