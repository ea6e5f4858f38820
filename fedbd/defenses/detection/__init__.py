"""Scores of samples: higher is more suspicious."""
