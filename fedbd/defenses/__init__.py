"""Defenses by where they act: on the client, in the aggregation, after it, over samples."""
