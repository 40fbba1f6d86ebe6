"""Layers that store and train only their active weights, and whole models made of them."""
