"""Experiments: one runnable script each, with its saved result table beside it."""
