"""Gradients of single samples: their norms and dot products."""
