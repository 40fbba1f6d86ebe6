"""What `fedprune new` copies: an app of Flower's with an own network, data set and method."""
