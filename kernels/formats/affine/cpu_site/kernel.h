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

#ifdef _OPENMP
#include <omp.h>
#endif

#include "decode.h"
#include "prefill.h"

namespace lopro {
namespace {

template <class V, int BITS, bool INT8>
void call(const AffineSite& s) {
  Plan p = make_plan(s);
#ifdef _OPENMP
  // At least so many bytes of weights per thread: waking one takes a few microseconds.
  int64_t useful = ceil_div(s.out * p.row_bytes * least(s.tokens, 64), 16384);
  int wanted = static_cast<int>(least(omp_get_max_threads(), useful));
#endif
  if (s.tokens <= DECODE_TOKENS) {
    Scratch scratch(s.tokens > 1 ? s.tokens * token_bytes(s, p) : 64);
    Token tokens[DECODE_TOKENS];
    if (s.tokens > 1)
      for (int64_t t = 0; t < s.tokens; ++t) tokens[t] = take_token(scratch, s, p);
    int64_t next = 0;
#ifdef _OPENMP
#pragma omp parallel num_threads(wanted)
    decode<V, BITS, INT8>(s, p, omp_get_thread_num(), omp_get_num_threads(), tokens, &next);
#else
    decode<V, BITS, INT8>(s, p, 0, 1, tokens, &next);
#endif
    return;
  }
  constexpr int64_t columns = INT8 ? 4 : 1;
  Scratch scratch(tiles_bytes<V>(s, p, columns));
  Tiles all = take_tiles<V>(scratch, s, p, columns);
#ifdef _OPENMP
#pragma omp parallel num_threads(wanted)
  prefill<V, BITS, INT8>(s, p, omp_get_thread_num(), omp_get_num_threads(), all);
#else
  prefill<V, BITS, INT8>(s, p, 0, 1, all);
#endif
}

template <class V>
void run_with(const AffineSite& s) {
  switch (s.bits) {
    case 2: return s.int8 ? call<V, 2, true>(s) : call<V, 2, false>(s);
    case 3: return s.int8 ? call<V, 3, true>(s) : call<V, 3, false>(s);
    case 4: return s.int8 ? call<V, 4, true>(s) : call<V, 4, false>(s);
    default: return s.int8 ? call<V, 8, true>(s) : call<V, 8, false>(s);
  }
}

}  // namespace
}  // namespace lopro
