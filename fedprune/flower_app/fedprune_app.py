"""What Flower loads; everything is in the installed fedprune package."""

from fedprune.client import app as client
from fedprune.server import app as server

__all__ = ["client", "server"]
