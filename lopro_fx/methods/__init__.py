"""Quantisation methods and their maths: tensors in, layers out. Nothing here knows a graph, a model or a file."""
