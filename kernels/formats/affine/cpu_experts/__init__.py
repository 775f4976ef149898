"""Experts on a CPU with weights in the format "affine", in C++ where a compiler was found."""
