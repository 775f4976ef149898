"""Activations rounded to integers: the one definition of what every kernel computes."""
