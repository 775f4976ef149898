"""Quantisation maths: tensors in, tensors out. Nothing here knows a graph, a model or a file."""
