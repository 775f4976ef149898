// The C function that Python calls.
#include "encode.h"

extern "C" __attribute__((visibility("default"))) void lopro_trellis_encode(
    int64_t width, int64_t rows, int64_t step, int64_t pair, int64_t window, const int64_t* strips, int64_t count,
    const float* columns, float* target, const float* upper, const float* pivots, const float* importance,
    const float* table, float* error, uint16_t* states) {
  lopro::run(lopro::Columns{width, rows, step, pair, window, strips, count, columns, target, upper, pivots, importance,
                            table, error, states});
}
