"""Masks: scores of weights, counts of layers, schedules, structures and adjustments."""
