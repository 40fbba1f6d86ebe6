"""Stages of pruning one after the other, with one budget."""
