"""The Flower layer: a defended strategy, a client mod and the engines, for the simulator and for any Flower project."""
