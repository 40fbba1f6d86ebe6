"""What Flower loads on a client."""

from fedprune.flower.client import app

__all__ = ["app"]
