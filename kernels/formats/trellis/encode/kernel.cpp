// The search, compiled once for each path.
#if defined(__GNUC__) && !defined(__clang__)
// Minima as single instructions: costs are neither NaN nor infinite.
#pragma GCC optimize("finite-math-only", "no-signed-zeros")
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
#include "search.h"

void lopro::LOPRO_PATH::run(const Columns& block) { encode(block); }
