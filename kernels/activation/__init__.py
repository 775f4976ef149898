"""Rounding of activations to integers: one definition for every kernel."""
