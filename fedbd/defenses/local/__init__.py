"""Defenses that replace a client's plain local training."""
