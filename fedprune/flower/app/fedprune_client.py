"""What Flower loads on a client, without torch; everything is in the installed package."""

from fedprune.flower.client import app

__all__ = ["app"]
