"""The composition root: a scenario, an engine, a folder; one run or many side by side, and going on with them."""
