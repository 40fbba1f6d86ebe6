"""Training on what is kept: distillation, run folders, comparison."""
