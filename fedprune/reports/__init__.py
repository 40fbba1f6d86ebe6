"""Pages, charts and tables of federated runs."""
