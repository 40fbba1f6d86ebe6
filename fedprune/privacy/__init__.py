"""What a server learns of a single client: sums under masks, and noise."""
