"""A run: the round loop, its folder, its workspace."""
