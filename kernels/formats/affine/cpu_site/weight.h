// The packed weight of a site, or of experts.
#pragma once

#include "cpu/operands.h"
#include "site.h"

namespace lopro {

// One weight, or with `stacked` those of experts: returns their number. x is known.
int64_t take_weight(AffineSite& s, bool stacked, AtenTensorHandle codes, AtenTensorHandle scales,
                    AtenTensorHandle zeros, int64_t bits, int64_t group_size);
// Moves from the first expert's weight to another one's.
void move_weight(AffineSite& s, int64_t expert);

}  // namespace lopro
