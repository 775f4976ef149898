// The kernel of lopro::trellis_cpu, compiled once for each path.
#include "kernel.h"

#include "cpu/path.h"

void lopro::LOPRO_PATH::run(const TrellisSite& site) { run_with<Vector>(site); }
