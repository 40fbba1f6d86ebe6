"""How a pruning is judged: what it must beat, and whether what it looks at foretells anything."""
