"""What a network's inputs, outputs and gradients look like: statistics that merge exactly."""
