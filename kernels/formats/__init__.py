"""Formats of packed weights, and the operators that compute with them."""
