"""The parts of `python -m simulations.compare_methods`."""
