"""Vectors of samples, by which prototypes, duplicates and neighbourhoods are found."""
