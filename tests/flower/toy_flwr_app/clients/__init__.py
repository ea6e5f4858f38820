"""The ClientApp of the toy app."""
