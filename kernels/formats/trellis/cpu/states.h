// States as vectors: 16 rows of a column, or of a pair.
#pragma once

#include "plan.h"

namespace lopro {
namespace {

// Products of the states of 16 rows, whose string begins at p.
template <class V, int STEP>
LOPRO_INLINE inline typename V::I products(const uint8_t* p, int mask) {
  return V::times_i(V::mask(V::template windows<STEP>(p), mask), MULTIPLIER);
}

// The same as weights in units, fp32: of the column and, for pairs, of the next one.
template <class V, int COLUMNS>
LOPRO_INLINE inline void units(typename V::I products, typename V::F (&out)[COLUMNS]) {
  typename V::I sums = V::template sums<COLUMNS>(products), centre = V::set_i(-CENTRE<COLUMNS>);
  if constexpr (COLUMNS == 1) {
    out[0] = V::to_f(V::add_i(sums, centre));
  } else {
    out[0] = V::to_f(V::add_i(V::mask(sums, 0xffff), centre));
    out[1] = V::to_f(V::add_i(V::template shr<16>(sums), centre));
  }
}

// Replaces the sums of rounded activations by what the products with byte sums exceed those with weights by, whole
// numbers below 2^24, which fp32 holds without error.
template <int COLUMNS>
void centre_sums(const Sizes& p, const int8_t* rounded, Token& token) {
  for (int64_t b = 0; b < p.blocks; ++b) {
    int sum = 0;
    for (int64_t j = 0; j < p.block; ++j) sum += rounded[b * p.block + j];
    token.sums[b] = static_cast<float>(-CENTRE<COLUMNS> * sum);
  }
}

}  // namespace
}  // namespace lopro
