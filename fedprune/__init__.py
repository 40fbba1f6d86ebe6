"""Federated pruning on Flower."""
