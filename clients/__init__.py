"""The Flower ClientApp of the simulator: ``app.py`` speaks Flower, ``step.py`` is one client's round without it."""
