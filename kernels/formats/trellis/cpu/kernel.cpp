// The kernel of lopro::trellis_cpu and lopro::trellis_cpu_experts, compiled once for each path.
#include "kernel.h"

#include "cpu/path.h"

void lopro::LOPRO_PATH::run(const Sites<TrellisSite>& all) { run_with<Vector>(all); }
