// Operands of lopro::trellis_cpu, or of one expert of lopro::trellis_cpu_experts. Names, shapes and the packed format
// are those of ../code.py.
#pragma once

#include "cpu/dispatch.h"
#include "cpu/site.h"

namespace lopro {

struct TrellisSite : Site {
  const uint8_t* codes;
  int64_t step;     // new bits of a state
  int64_t columns;  // that a state gives: 1 or 2
  int64_t window;   // bits of a state
  int64_t strips, strip;  // all but the last have `strip` rows
};

}  // namespace lopro

LOPRO_KERNEL(Sites<TrellisSite>)
