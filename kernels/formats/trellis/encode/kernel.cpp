// The search, compiled once for each path.
#if defined(__GNUC__) && !defined(__clang__)
// Minima as single instructions: costs are neither NaN nor infinite.
#pragma GCC optimize("finite-math-only", "no-signed-zeros")
#endif

#include "search.h"

void lopro::LOPRO_PATH::run(const Columns& block) { encode(block); }
