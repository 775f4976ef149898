// The loops, compiled once for each path.
#include "loops.h"

void lopro::LOPRO_PATH::run(const GridFit& f) { over_tiles(f, fit_tile); }
void lopro::LOPRO_PATH::run(const ColumnRounding& r) { over_tiles(r, round_tile); }
void lopro::LOPRO_PATH::run(const ColumnDescent& d) { over_tiles(d, descend_tile); }
