"""Block-sparse linear layers for tensor cores."""
