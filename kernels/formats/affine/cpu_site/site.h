// Operands of lopro::cpu_site, or of one expert of lopro::cpu_experts. Names, shapes and the packed format are those of
// reference.py.
#pragma once

#include "cpu/dispatch.h"
#include "cpu/site.h"

namespace lopro {

struct AffineSite : Site {
  const uint32_t* codes;
  const uint32_t* zeros;
  int64_t zero_words, groups, group, bits;
};

}  // namespace lopro

LOPRO_KERNEL(Sites<AffineSite>)
