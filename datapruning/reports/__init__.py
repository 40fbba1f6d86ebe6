"""Pages and charts of scores and training runs."""
