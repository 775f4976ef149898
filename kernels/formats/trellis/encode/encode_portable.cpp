#define LANES 4
#include "search.h"

namespace lopro {
void encode_portable(const Columns& block) { encode(block); }
}  // namespace lopro
