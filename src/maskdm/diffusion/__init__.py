"""Noise schedules and the denoising objective of both stages."""
