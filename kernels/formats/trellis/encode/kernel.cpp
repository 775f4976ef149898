// The search, compiled once for each path.
#include "strips.h"

void lopro::LOPRO_PATH::run(const Columns& block) { encode(block); }
