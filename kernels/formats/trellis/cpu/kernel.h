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

#include "cpu/sites.h"
#include "decode.h"
#include "prefill.h"

namespace lopro {
namespace {

template <class V, int STEP, int COLUMNS, bool INT8>
void call(const Sites<TrellisSite>& all) {
  Plan p = make_plan(*all.first);
  run_sites<V>(
      all, p, all.first->out * all.first->step / 8 * p.states, INT8 ? 2 : 1,
      [&](const TrellisSite& s, int thread, int threads, Token* tokens, int64_t* next) {
        decode<V, STEP, COLUMNS, INT8>(s, p, thread, threads, tokens, next);
      },
      [&](const TrellisSite& s, int thread, int threads, const Tiles& tiles) {
        prefill<V, STEP, COLUMNS, INT8>(s, p, thread, threads, tiles);
      });
}

template <class V, int STEP, int COLUMNS>
void run_step(const Sites<TrellisSite>& all) {
  all.first->int8 ? call<V, STEP, COLUMNS, true>(all) : call<V, STEP, COLUMNS, false>(all);
}

template <class V>
void run_with(const Sites<TrellisSite>& all) {
  switch (all.first->step * 2 + all.first->columns - 1) {
    case 4: return run_step<V, 2, 1>(all);
    case 6: return run_step<V, 3, 1>(all);
    case 8: return run_step<V, 4, 1>(all);
    case 7: return run_step<V, 3, 2>(all);
    case 9: return run_step<V, 4, 2>(all);
    default: return run_step<V, 5, 2>(all);
  }
}

}  // namespace
}  // namespace lopro
