"""Kernels that compute with sparse weights: a native CPU library and a plain torch reference."""
