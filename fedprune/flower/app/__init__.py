"""A thin Flower app: pyproject.toml and one module that imports the installed package.

Run it with Flower's own command, `flwr run .` in this folder.
"""
