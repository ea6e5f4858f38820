"""One model without a federation: training it on one data set, and methods on a model from anywhere."""
