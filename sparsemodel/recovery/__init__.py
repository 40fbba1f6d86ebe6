"""What mends a network after pruning: biases, other masks, a few trained parameters."""
