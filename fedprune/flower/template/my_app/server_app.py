"""What Flower loads on the server."""

from fedprune.flower.server import app

__all__ = ["app"]
