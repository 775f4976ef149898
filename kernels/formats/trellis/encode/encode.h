// Rounding of columns to the trellis code: a Viterbi search down each column of a strip, with error feedback.
#pragma once

#include <cstdint>

#include "cpu/dispatch.h"

namespace lopro {

// Operands of one block of columns; matrices are (columns, rows), contiguous.
struct Columns {
  int64_t width, rows;       // columns of the block (a multiple of `pair`), rows of the weight
  int64_t step, pair, window;
  const int64_t* strips;     // (count,) rows of each strip
  int64_t count;
  const float* columns;      // weights, in units of their rows' scales
  float* target;             // the same with feedback; changed
  const float* upper;        // (width, width) unit upper triangular
  const float* pivots;       // (width,)
  const float* importance;   // (rows,) weights of the rows' squared errors
  const float* table;        // (pair, 2^window) values of the states
  float* error;              // out: `columns` less the rounded values
  uint16_t* states;          // out: (width / pair, rows)
};

}  // namespace lopro

LOPRO_KERNEL(Columns)
