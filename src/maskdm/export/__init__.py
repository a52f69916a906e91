"""Trained models in the form that other tools open."""
