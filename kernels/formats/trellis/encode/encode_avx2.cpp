#if defined(__x86_64__)
#define LANES 8
#include "search.h"

namespace lopro {
void encode_avx2(const Columns& block) { encode(block); }
}  // namespace lopro
#endif
