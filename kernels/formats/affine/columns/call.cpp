// The C functions that Python calls.
#include "columns.h"

#define LOPRO_PUBLIC extern "C" __attribute__((visibility("default")))

LOPRO_PUBLIC void lopro_affine_fit(int64_t width, int64_t rows, int64_t top, int64_t steps, double shrink,
                                   const float* block, const float* weights, float* scale, float* zero) {
  lopro::run(lopro::GridFit{width, rows, top, steps, shrink, block, weights, scale, zero});
}

LOPRO_PUBLIC void lopro_affine_round(int64_t width, int64_t rows, int64_t top, int64_t stride, const float* columns,
                                     const float* target, const float* upper, const float* scale, const float* zero,
                                     uint8_t* codes, float* error) {
  lopro::run(lopro::ColumnRounding{width, rows, top, stride, columns, target, upper, scale, zero, codes, error});
}

LOPRO_PUBLIC void lopro_affine_descend(int64_t width, int64_t rows, int64_t top, int64_t group, bool scales,
                                       const float* slope, const float* gram, const float* zero, uint8_t* codes,
                                       float* error, float* scale) {
  lopro::run(lopro::ColumnDescent{width, rows, top, group, scales, slope, gram, zero, codes, error, scale});
}
