"""Sparse models: masks, criteria, schedules, sparse optimisers and a wire format.

Needs only torch, numpy and safetensors.
"""
