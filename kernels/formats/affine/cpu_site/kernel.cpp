// The kernel of lopro::cpu_site and lopro::cpu_experts, compiled once for each path.
#include "kernel.h"

#include "cpu/path.h"

void lopro::LOPRO_PATH::run(const Sites<AffineSite>& all) { run_with<Vector>(all); }
