"""Sparse training without torch: patterns, programs, states and their trainer.

numpy and the native library alone. What is torch's side of it lies in `masks`, `plans` and
`layers`.
"""
