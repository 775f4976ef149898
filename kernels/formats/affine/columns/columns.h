// Loops over columns that round them to grids. Matrices are (columns, rows), contiguous; rows don't meet.
#pragma once

#include <cstdint>

#include "cpu/dispatch.h"

namespace lopro {

// The grid of each row of one group, by a search over clipping ranges.
struct GridFit {
  int64_t width, rows, top, steps;  // `top` is the largest code
  double shrink;
  const float* block;               // weights
  const float* weights;             // (width,) of the columns' errors
  float *scale, *zero;              // out: (rows,)
};

// Rounding of a block of columns, each with the feedback of those before.
struct ColumnRounding {
  int64_t width, rows, top;
  int64_t stride;                   // from one column's grid to the next: `rows`, or 0 for one grid
  const float *columns, *target;    // weights; the same with the feedback of earlier blocks
  const float* upper;               // (width, width) unit upper triangular
  const float *scale, *zero;
  uint8_t* codes;                   // out
  float* error;                     // out: `columns` less the rounded values
};

// Coordinate descent over a block of columns in groups, with a step of each group's scale.
struct ColumnDescent {
  int64_t width, rows, top;
  int64_t group;                    // columns that share a grid; the last group may have fewer
  bool scales;                      // whether to move them
  const float* slope;               // (E H) of these columns, transposed
  const float* gram;                // (width, width) their part of H
  const float* zero;                // (groups, rows)
  uint8_t* codes;                   // changed
  float* error;                     // E, changed with the codes and scales
  float* scale;                     // (groups, rows), changed
};

}  // namespace lopro

LOPRO_KERNEL(GridFit)
LOPRO_KERNEL(ColumnRounding)
LOPRO_KERNEL(ColumnDescent)
