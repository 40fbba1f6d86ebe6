"""Grids of trainings on kept sets: what is run, how, and what is told of it."""
