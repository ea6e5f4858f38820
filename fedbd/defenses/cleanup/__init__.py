"""Repairs of a model after aggregation."""
