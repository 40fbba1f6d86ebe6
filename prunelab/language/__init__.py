"""Causal language models of transformers: reading them, text for them, and their perplexity."""
