"""Evaluators: one file each, bound by name in `train.evaluators`."""
