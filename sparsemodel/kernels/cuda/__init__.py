"""CUDA kernels: compiled at run time, launched on torch's stream."""
