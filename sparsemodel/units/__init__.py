"""What of a transformer is removed as one: heads, KV groups, channels, blocks."""
