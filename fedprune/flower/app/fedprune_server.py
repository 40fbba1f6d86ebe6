"""What Flower loads on the server; everything is in the installed package."""

from fedprune.flower.server import app

__all__ = ["app"]
