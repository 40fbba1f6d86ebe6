"""A device's side of a fleet: its keys, profile, budget and node."""
