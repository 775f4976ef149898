// The packed weight of a site, or of experts.
#pragma once

#include "cpu/operands.h"
#include "site.h"

namespace lopro {

// One weight, or with `stacked` those of experts: returns their number. x is known.
int64_t take_weight(TrellisSite& s, bool stacked, AtenTensorHandle scales, AtenTensorHandle codes, double bits,
                    int64_t columns, int64_t window, int64_t strip);
// Moves from the first expert's weight to another one's.
void move_weight(TrellisSite& s, int64_t expert);

}  // namespace lopro
