// Runs sites that differ in their tensors and rows alone.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include "tiles.h"

namespace lopro {
namespace {

// Tokens that threads share, of the sites of one parallel region: a bound on their memory.
constexpr int64_t SHARED_TOKENS = 64;

// body(thread, threads) on one thread for each 16 KiB of `bytes` at most: waking one takes a few microseconds.
template <class Body>
void in_parallel([[maybe_unused]] int64_t bytes, Body body) {
#ifdef _OPENMP
  int64_t useful = ceil_div(bytes, 16384);
  int wanted = static_cast<int>(least(omp_get_max_threads(), useful > 1 ? useful : 1));
#pragma omp parallel num_threads(wanted)
  body(omp_get_thread_num(), omp_get_num_threads());
#else
  body(0, 1);
#endif
}

// Fills `all.rotated`.
template <class V, class S>
void rotate_all(const Sites<S>& all, const Sizes& p) {
  Site whole = *all.first;
  whole.rows = nullptr;
  whole.rotated = nullptr;
  in_parallel(all.tokens * whole.in, [&](int thread, int threads) {
    Scratch scratch((p.columns + 16) * 8 + 64);
    float* raw = scratch.take<float>(p.columns + 16);
    float* x = scratch.take<float>(p.columns + 16);
    for (int64_t t = thread; t < all.tokens; t += threads) {
      rotate<V>(whole, p, t, raw, x);
      std::memcpy(all.rotated + t * whole.in, x, static_cast<size_t>(whole.in) * 4);
    }
  });
}

// Sites of few tokens, in one parallel region: a thread that has no more work at one goes on to the next.
template <class S, class P, class Decode>
void decode_sites(const S* first, const S* end, const P& p, int64_t bytes, Decode decode) {
  int64_t shared = 0, most = 1;
  for (const S* s = first; s < end; ++s) {
    if (s->tokens > 1) shared += s->tokens;
    if (s->tokens > most) most = s->tokens;
  }
  int64_t token = static_cast<int64_t>(sizeof(Token));
  Scratch scratch(shared * (token_bytes(*first, p) + token) + (end - first) * 8 + 128);
  Token* tokens = scratch.take<Token>(shared);
  int64_t* next = scratch.take<int64_t>(end - first);
  for (int64_t t = 0; t < shared; ++t) tokens[t] = take_token(scratch, *first, p);
  for (int64_t i = 0; i < end - first; ++i) next[i] = 0;
  in_parallel(bytes * most, [&](int thread, int threads) {
    Token* own = tokens;
    for (const S* s = first; s < end; ++s) {
      decode(*s, thread, threads, own, next + (s - first));
      if (s->tokens > 1) own += s->tokens;
    }
  });
}

// `bytes` are those of a weight, and `columns` those of a tile's word. decode(s, thread, threads, tokens, next) and
// prefill(s, thread, threads, tiles) are the work of one thread.
template <class V, class S, class P, class Decode, class Prefill>
void run_sites(const Sites<S>& all, const P& p, int64_t bytes, int64_t columns, Decode decode, Prefill prefill) {
  if (all.rotated) rotate_all<V>(all, p);
  const S* end = all.first + all.count;
  for (const S* s = all.first; s < end;) {
    const S* first = s;
    for (int64_t tokens = 0; s < end && s->tokens <= DECODE_TOKENS && tokens < SHARED_TOKENS; ++s)
      if (s->tokens > 1) tokens += s->tokens;
    if (s > first) {
      decode_sites(first, s, p, bytes, decode);
      continue;
    }
    Scratch scratch(tiles_bytes<V>(*s, p, columns));
    Tiles tiles = take_tiles<V>(scratch, *s, p, columns);
    in_parallel(bytes * least(s->tokens, 64), [&](int thread, int threads) { prefill(*s, thread, threads, tiles); });
    ++s;
  }
}

}  // namespace
}  // namespace lopro
