// The C function that Python calls, and the choice of a path at run time.

#include "encode.h"

#if defined(__x86_64__)
static bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
}
static bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

// `path`: 0 for the fastest, 1 portable, 2 AVX2, 3 AVX-512. Returns the path taken, 0 if this processor lacks it.
extern "C" __attribute__((visibility("default"))) int lopro_trellis_encode(
    int path, int64_t width, int64_t rows, int64_t step, int64_t pair, int64_t window, const int64_t* strips,
    int64_t count, const float* columns, float* target, const float* upper, const float* pivots,
    const float* importance, const float* table, float* error, uint16_t* states) {
  lopro::Columns block{width, rows,  step,   pair,       window, strips, count, columns,
                       target, upper, pivots, importance, table,  error,  states};
#if defined(__x86_64__)
  if ((path == 0 || path == 3) && has_avx512()) return lopro::encode_avx512(block), 3;
  if ((path == 0 || path == 2) && has_avx2()) return lopro::encode_avx2(block), 2;
#endif
  if (path > 1) return 0;
  return lopro::encode_portable(block), 1;
}
