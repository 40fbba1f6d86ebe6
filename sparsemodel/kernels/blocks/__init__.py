"""Block-sparse and 2:4 linear layers for tensor cores."""
