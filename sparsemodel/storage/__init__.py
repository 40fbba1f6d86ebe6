"""Sparse models on disk, and what they cost in operations, bytes and memory."""
