"""Performance and robustness checks, each a command: `python -m benchmarks.NAME`."""
