"""One Linear on a CPU: rotation, low-rank branch and packed product, in C++ where a compiler was found."""
