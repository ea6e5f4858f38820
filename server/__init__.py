"""The Flower ServerApp of the simulator.

``app.py`` speaks Flower, ``step.py`` is what follows a round's aggregation, ``cleaning.py`` and ``detecting.py`` are
the policies: when to clean or detect, on what data, keep or roll back.
"""
