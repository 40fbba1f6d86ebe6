"""What Flower loads; everything is in the installed fedprune package."""

from fedprune.flower.client import app as client
from fedprune.flower.server import app as server

__all__ = ["client", "server"]
