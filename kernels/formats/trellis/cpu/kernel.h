// The algorithm of every path, over 16 lanes of 32 bits that the path defines (struct Vector).
//
// Everything here has internal linkage: each file is compiled for another processor, and the linker must not take one
// file's copy of a function for another's.
//
// Rows lie in lanes. The windows of 16 rows are some bytes of a string, which are broadcast and shifted; a product of
// integers makes states bytes, whose sums are weights in units, off by a constant that is subtracted once a block:
//
//   y = s_w / 128 * sum over blocks of step * (sum b * int8 - centre * sum int8)
//
// The last 32 rows of a string are read from a copy with zeros after it: in memory, the next string follows.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include "decode.h"
#include "prefill.h"

namespace lopro {
namespace {

template <class V, int STEP, int COLUMNS, bool INT8>
void call(const TrellisSite& s) {
  Plan p = make_plan(s);
#ifdef _OPENMP
  // At least so many bytes of weights per thread: waking one takes a few microseconds.
  int64_t useful = ceil_div(s.out * s.step / 8 * p.states * least(s.tokens, 64), 16384);
  int wanted = static_cast<int>(least(omp_get_max_threads(), useful > 1 ? useful : 1));
#endif
  if (s.tokens <= DECODE_TOKENS) {
    Scratch scratch(s.tokens > 1 ? s.tokens * token_bytes(s, p) : 64);
    Token tokens[DECODE_TOKENS];
    if (s.tokens > 1)
      for (int64_t t = 0; t < s.tokens; ++t) tokens[t] = take_token(scratch, s, p);
    int64_t next = 0;
#ifdef _OPENMP
#pragma omp parallel num_threads(wanted)
    decode<V, STEP, COLUMNS, INT8>(s, p, omp_get_thread_num(), omp_get_num_threads(), tokens, &next);
#else
    decode<V, STEP, COLUMNS, INT8>(s, p, 0, 1, tokens, &next);
#endif
    return;
  }
  constexpr int64_t columns = INT8 ? 2 : 1;
  Scratch scratch(tiles_bytes<V>(s, p, columns));
  Tiles all = take_tiles<V>(scratch, s, p, columns);
#ifdef _OPENMP
#pragma omp parallel num_threads(wanted)
  prefill<V, STEP, COLUMNS, INT8>(s, p, omp_get_thread_num(), omp_get_num_threads(), all);
#else
  prefill<V, STEP, COLUMNS, INT8>(s, p, 0, 1, all);
#endif
}

template <class V, int STEP, int COLUMNS>
void run_step(const TrellisSite& s) {
  s.int8 ? call<V, STEP, COLUMNS, true>(s) : call<V, STEP, COLUMNS, false>(s);
}

template <class V>
void run_with(const TrellisSite& s) {
  switch (s.step * 2 + s.columns - 1) {
    case 4: return run_step<V, 2, 1>(s);
    case 6: return run_step<V, 3, 1>(s);
    case 8: return run_step<V, 4, 1>(s);
    case 7: return run_step<V, 3, 2>(s);
    case 9: return run_step<V, 4, 2>(s);
    default: return run_step<V, 5, 2>(s);
  }
}

}  // namespace
}  // namespace lopro
