// The algorithm of every path, over 16 lanes of 32 bits that the path defines (struct Vector).
//
// Everything here has internal linkage: each file is compiled for another processor, and the linker must not take one
// file's copy of a function for another's.
//
// Weights are read as they are stored. 64 bytes of a row are one chunk: lane l holds `lane` codes in a row, byte p of
// the chunk holds codes p*fields ... p*fields + fields - 1, so that a shift and a mask give 64 codes as bytes. The
// activation is stored in the same order, field by field, and a chunk is `fields` products of bytes. Input columns are
// divided into blocks of 32, 64 or 128, which divide the groups of the weight: a lane belongs to one block, so scales
// are applied lane by lane, and lanes are added up once a row.
//
//   y = sum over blocks of s_w * (sum q * x - (zero + 1/2) * sum x),   x = step * int8 where activations are rounded
//
// For many tokens, V::panel * 16 rows are transposed and unpacked into a panel (int8: four codes of each row side by
// side). Tiles of V::tile tokens share it while it is in the cache.
#pragma once

#include "cpu/sites.h"
#include "decode.h"
#include "prefill.h"

namespace lopro {
namespace {

template <class V, int BITS, bool INT8>
void call(const Sites<AffineSite>& all) {
  Plan p = make_plan(*all.first);
  run_sites<V>(
      all, p, all.first->out * p.row_bytes, INT8 ? 4 : 1,
      [&](const AffineSite& s, int thread, int threads, Token* tokens, int64_t* next) {
        decode<V, BITS, INT8>(s, p, thread, threads, tokens, next);
      },
      [&](const AffineSite& s, int thread, int threads, const Tiles& tiles) {
        prefill<V, BITS, INT8>(s, p, thread, threads, tiles);
      });
}

template <class V>
void run_with(const Sites<AffineSite>& all) {
  bool int8 = all.first->int8;
  switch (all.first->bits) {
    case 2: return int8 ? call<V, 2, true>(all) : call<V, 2, false>(all);
    case 3: return int8 ? call<V, 3, true>(all) : call<V, 3, false>(all);
    case 4: return int8 ? call<V, 4, true>(all) : call<V, 4, false>(all);
    default: return int8 ? call<V, 8, true>(all) : call<V, 8, false>(all);
  }
}

}  // namespace
}  // namespace lopro
