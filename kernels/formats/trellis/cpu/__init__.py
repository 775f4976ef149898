"""One Linear on a CPU with a weight in the format "trellis", in C++ where a compiler was found."""
