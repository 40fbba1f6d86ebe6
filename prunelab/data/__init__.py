"""Data sets, samples and what a network is fed of them."""
