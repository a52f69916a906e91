"""Distances between generated and real images, with their provenance."""
