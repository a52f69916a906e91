"""Denoisers: `model(patches, positions, t, labels) -> patches`."""
