"""Laws of learning from pruned data: the perceptron's curve, scaling laws."""
