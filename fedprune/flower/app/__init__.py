"""A thin Flower app: pyproject.toml and two modules that import the installed package.

Run it with Flower's own command, `flwr run .` in this folder.
"""
