// The kernel of lopro::cpu_site, compiled once for each path.
#include "kernel.h"

#include "cpu/path.h"

void lopro::LOPRO_PATH::run(const AffineSite& site) { run_with<Vector>(site); }
