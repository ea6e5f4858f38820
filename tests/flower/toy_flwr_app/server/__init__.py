"""The ServerApp of the toy app."""
