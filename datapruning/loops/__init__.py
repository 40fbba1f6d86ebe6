"""Data pruning in loops of others: transformers' Trainer, Lightning, scikit-learn."""
