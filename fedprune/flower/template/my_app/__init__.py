"""An app of Flower's: federated pruning of an own network on own data by an own method."""
