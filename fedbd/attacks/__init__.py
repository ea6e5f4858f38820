"""Triggers and attacks, one per file."""
