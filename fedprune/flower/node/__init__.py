"""A device's node: Flower's fleet interface and the ClientApp in one process."""
