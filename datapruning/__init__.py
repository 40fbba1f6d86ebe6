"""Data pruning: score training samples, select a subset and train on it."""
