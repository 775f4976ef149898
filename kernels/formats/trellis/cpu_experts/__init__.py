"""Experts on a CPU with weights in the format "trellis", in C++ where a compiler was found."""
