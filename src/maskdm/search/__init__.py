"""The search for a schedule: which masks, for how long, at which learning rates."""
