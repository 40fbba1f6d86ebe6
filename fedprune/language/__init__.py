"""Pruning language models."""
