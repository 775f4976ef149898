#if defined(__x86_64__)
#define LANES 16
#include "search.h"

namespace lopro {
void encode_avx512(const Columns& block) { encode(block); }
}  // namespace lopro
#endif
