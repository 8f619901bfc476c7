"""The network: weights, a backbone as named stages, and the head that replaces its last layer."""
