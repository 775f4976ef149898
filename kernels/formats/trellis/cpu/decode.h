// Few tokens: states are read once and used at once, rows in lanes and the activation broadcast.
#pragma once

#include "cpu/activation.h"
#include "states.h"

namespace lopro {
namespace {

// Columns that are multiplied with all rows of a unit in turn, so that their strings are read from L1 or L2.
constexpr int64_t TILE_COLUMNS = 128;
// Rows of a unit of work at most.
constexpr int64_t UNIT_ROWS = 512;

// Strings of the states of a tile, from the first row on.
struct Strings {
  const uint8_t* codes;
  int64_t stride;
  int64_t ahead;  // distance in bytes of what to prefetch; 0 prefetches nothing
};

// What `windows_mixed` takes of the rows from `codes` on, where it is used.
template <class V, int STEP, bool MIXED>
LOPRO_INLINE inline auto mixed_bits([[maybe_unused]] const uint8_t* codes) {
  if constexpr (MIXED) return V::template load_mixed<STEP>(codes);
  else return 0;
}

// sums (T, `sums_stride`) += products of R * 16 rows with T tokens, over `states` states from `first` on.
template <class V, int STEP, int COLUMNS, bool INT8, int R, int T>
void multiply(const Plan& p, Strings strings, int mask, const Token* tokens, int64_t first, int64_t states, float* sums,
              int64_t sums_stride) {
  using F = typename V::F;
  using I = typename V::I;
  constexpr int lines = (R * 2 * STEP + 63) / 64;
  constexpr bool mixed = INT8 && R == 4 && T == 1 && V::template mixes<STEP>;
  const uint8_t* codes = strings.codes;
  auto fetch_next = [&]() LOPRO_INLINE {
    if (strings.ahead) repeat<lines>([&](auto i) LOPRO_INLINE { V::fetch(codes + strings.ahead + i * 64); });
  };
  const uint32_t* x[T];
  for (int t = 0; t < T; ++t)
    x[t] = static_cast<const uint32_t*>(tokens[t].x) + first * (INT8 ? 1 : COLUMNS);
  if (INT8) {
    int64_t each = p.block / COLUMNS;
    for (int64_t b = first * COLUMNS >> p.log_block; states > 0; ++b, states -= each) {
      I dot[R][T];
      repeat<R>([&](auto r) LOPRO_INLINE { repeat<T>([&](auto t) LOPRO_INLINE { dot[r][t] = V::zero_i(); }); });
      for (int64_t c = least(each, states); c > 0; --c, codes += strings.stride) {
        fetch_next();
        I own[T];
        repeat<T>([&](auto t) LOPRO_INLINE { own[t] = V::set_i(static_cast<int>(*x[t]++)); });
        auto bits = mixed_bits<V, STEP, mixed>(codes);
        repeat<R>([&](auto r) LOPRO_INLINE {
          I own_products;
          if constexpr (mixed)
            own_products = V::times_i(V::mask(V::template windows_mixed<STEP, r>(bits), mask), MULTIPLIER);
          else own_products = products<V, STEP>(codes + r * 2 * STEP, mask);
          I factor = V::template factor<COLUMNS>(own_products);
          repeat<T>([&](auto t) LOPRO_INLINE {
            dot[r][t] = V::dot_factor(dot[r][t], factor, own[t]);
            V::hold(dot[r][t]);
          });
        });
      }
      if constexpr (mixed) V::unmix(dot[0][0], dot[1][0], dot[2][0], dot[3][0]);
      repeat<T>([&](auto t) LOPRO_INLINE {
        F step = V::set(tokens[t].steps[b]), centre = V::set(tokens[t].sums[b]);
        repeat<R>([&](auto r) LOPRO_INLINE {
          float* out = sums + t * sums_stride + r * 16;
          V::store(out, V::fma(V::add(V::to_f(dot[r][t]), centre), step, V::load(out)));
        });
      });
    }
    return;
  }
  F dot[R][T];
  repeat<R>([&](auto r) LOPRO_INLINE { repeat<T>([&](auto t) LOPRO_INLINE { dot[r][t] = V::zero(); }); });
  for (; states > 0; --states, codes += strings.stride) {
    fetch_next();
    repeat<R>([&](auto r) LOPRO_INLINE {
      F unit[COLUMNS];
      units<V, COLUMNS>(products<V, STEP>(codes + r * 2 * STEP, mask), unit);
      repeat<T>([&](auto t) LOPRO_INLINE {
        repeat<COLUMNS>([&](auto j) LOPRO_INLINE {
          F own = V::set(reinterpret_cast<const float*>(x[t])[j]);
          dot[r][t] = V::fma(unit[j], own, dot[r][t]);
        });
      });
    });
    for (int t = 0; t < T; ++t) x[t] += COLUMNS;
  }
  repeat<T>([&](auto t) LOPRO_INLINE {
    repeat<R>([&](auto r) LOPRO_INLINE {
      float* out = sums + t * sums_stride + r * 16;
      V::store(out, V::add(V::load(out), dot[r][t]));
    });
  });
}

// `multiply` for rows from ... to - 1 of the strings, R * 16 at a time and at last fewer.
template <class V, int STEP, int COLUMNS, bool INT8, int R, int T>
void multiply_rows(const Plan& p, Strings strings, int mask, const Token* tokens, int64_t first, int64_t states,
                   int64_t from, int64_t to, float* sums, int64_t sums_stride) {
  const uint8_t* codes = strings.codes;
  for (; from + R * 16 <= to; from += R * 16, sums += R * 16) {
    strings.codes = codes + from / 8 * STEP;
    multiply<V, STEP, COLUMNS, INT8, R, T>(p, strings, mask, tokens, first, states, sums, sums_stride);
  }
  strings.codes = codes;
  if constexpr (R > 1)
    if (from < to)
      multiply_rows<V, STEP, COLUMNS, INT8, R / 2, T>(p, strings, mask, tokens, first, states, from, to, sums,
                                                       sums_stride);
}

// y of rows row ... row + rows - 1 of one token, from its sums in units.
template <class V>
void finish(const Site& s, const Sizes& p, const Token& token, int64_t index, int64_t row, int64_t rows, float* sums) {
  using F = typename V::F;
  const F unit = V::set(UNIT);
  for (int64_t i = 0; i < rows; i += 16) {
    int n = static_cast<int>(least(16, rows - i));
    F scale = s.scales_type == Type::f32 ? V::load_n(static_cast<const float*>(s.scales) + row + i, n)
                                         : V::load_f16(static_cast<const uint16_t*>(s.scales) + row + i, n);
    V::store(sums + i, V::mul(V::load(sums + i), V::mul(scale, unit)));
  }
  for (int64_t i = 0; s.rank && i < rows; ++i) {
    const float* latent = token.latent + part_of(s, row + i) * p.lanes;
    F sum = V::zero();
    for (int64_t j = 0; j < s.rank; j += 16) {
      int n = static_cast<int>(least(16, s.rank - j));
      int64_t at = (row + i) * s.rank + j;
      F up = s.up_type == Type::i8 ? V::load_i8(static_cast<const int8_t*>(s.up) + at, n)
                                   : V::load_f16(static_cast<const uint16_t*>(s.up) + at, n);
      sum = V::fma(up, V::load(latent + j), sum);
    }
    sums[i] += V::reduce(sum);
  }
  if (s.bias)
    for (int64_t i = 0; i < rows; ++i) sums[i] += load_scalar(s.bias, s.bias_type, row + i);
  int64_t first = row_of(s, index) * s.out + row;
  for (int64_t i = 0; i < rows; ++i) store_scalar(s.y, s.type, first + i, sums[i]);
}

// Units of work: strips, cut where they are long or threads many.
struct Units {
  int64_t rows;   // of a unit at most
  int64_t each;   // units of a strip, but the last one
  int64_t count;
  Units(const TrellisSite& s, int threads) : rows(UNIT_ROWS) {
    while (rows > 64 && s.out < rows * threads) rows /= 2;
    each = ceil_div(s.strip, rows);
    count = (s.strips - 1) * each + ceil_div(s.out - (s.strips - 1) * s.strip, rows);
  }
};

// y of one unit of rows for all tokens; `sums` holds (tokens, units.rows) numbers, `ends` those of a tile.
template <class V, int STEP, int COLUMNS, bool INT8>
void decode_unit(const TrellisSite& s, const Plan& p, const Units& units, int64_t unit, const Token* tokens,
                 uint8_t* ends, float* sums) {
  constexpr int64_t tile = TILE_COLUMNS / COLUMNS;
  int64_t index = least(unit / units.each, s.strips - 1);
  Strip strip = strip_at(s, p, index);
  int64_t padded = round_up(strip.rows, 32), from = (unit - index * units.each) * units.rows;
  int64_t to = least(from + units.rows, padded), whole = to == padded ? to - 32 : to;
  int mask = (1 << s.window) - 1;
  std::memset(sums, 0, static_cast<size_t>(s.tokens * units.rows) * 4);
  for (int64_t c = 0; c < p.states; c += tile) {
    int64_t states = least(tile, p.states - c);
    Strings strings = {strip.codes + c * strip.stride, strip.stride, tile * strip.stride};
    Strings after = {ends, Ends<STEP>::stride, 0};
    if (to == padded) Ends<STEP>::copy(strip, c, states, ends);
    auto run = [&](auto runs, auto count, int64_t t) {
      constexpr int R = decltype(runs)::value, T = decltype(count)::value;
      float* own = sums + t * units.rows;
      multiply_rows<V, STEP, COLUMNS, INT8, R, T>(p, strings, mask, tokens + t, c, states, from, whole, own,
                                                  units.rows);
      if (to == padded)
        multiply_rows<V, STEP, COLUMNS, INT8, (R < 2 ? R : 2), T>(p, after, mask, tokens + t, c, states, 0, 32,
                                                                   own + whole - from, units.rows);
    };
    int64_t t = 0;
    for (; t + 4 <= s.tokens; t += 4)
      run(std::integral_constant<int, V::shared_runs>{}, std::integral_constant<int, 4>{}, t);
    for (; t < s.tokens; ++t) run(std::integral_constant<int, V::runs>{}, std::integral_constant<int, 1>{}, t);
  }
  for (int64_t t = 0; t < s.tokens; ++t)
    finish<V>(s, p, tokens[t], t, strip.row + from, least(to, strip.rows) - from, sums + t * units.rows);
}

// Memory of one token in a decode call.
inline int64_t token_bytes(const Site& s, const Plan& p) {
  return p.columns * 4 + 2 * p.padded_blocks * 4 + latent_size(s, p) * 4 + 512;
}

inline Token take_token(Scratch& scratch, const Site& s, const Plan& p) {
  Token token;
  token.x = scratch.take<float>(p.columns);
  token.steps = scratch.take<float>(p.padded_blocks);
  token.sums = scratch.take<float>(p.padded_blocks);
  token.latent = scratch.take<float>(latent_size(s, p));
  return token;
}

template <class V, int COLUMNS, bool INT8>
void prepare_decode(const Site& s, const Plan& p, int64_t index, Token& token, float* raw, float* x, int8_t* rounded) {
  rotate<V>(s, p, index, raw, x);
  if (s.rank) project<V, 1>(s, p, x, 0, &token);
  round_blocks<V, INT8>(p, x, s.largest, rounded, token);
  if (INT8) {
    uint32_t* words = static_cast<uint32_t*>(token.x);
    for (int64_t c = 0; c < p.states; ++c)
      words[c] = V::template spread<COLUMNS>(rounded[c * COLUMNS], rounded[c * COLUMNS + COLUMNS - 1]);
    centre_sums<COLUMNS>(p, rounded, token);
  } else {
    std::memcpy(token.x, x, static_cast<size_t>(p.columns) * 4);
  }
}

// Work of one thread. `next` counts the units that free threads have taken.
template <class V, int STEP, int COLUMNS, bool INT8>
void decode(const TrellisSite& s, const Plan& p, int thread, int threads, Token* shared, int64_t* next) {
  Units units(s, threads);
  constexpr int64_t ends_bytes = TILE_COLUMNS / COLUMNS * Ends<STEP>::stride;
  Scratch scratch((p.columns + 16) * 9 + token_bytes(s, p) + ends_bytes + s.tokens * units.rows * 4 + 1024);
  float* raw = scratch.take<float>(p.columns + 16);
  float* x = scratch.take<float>(p.columns + 16);
  int8_t* rounded = scratch.take<int8_t>(p.columns);
  uint8_t* ends = scratch.take<uint8_t>(ends_bytes);
  float* sums = scratch.take<float>(s.tokens * units.rows);
  Token own;
  if (s.tokens == 1) {
    // Every thread prepares the one token for itself: waiting for another thread would take longer.
    own = take_token(scratch, s, p);
    prepare_decode<V, COLUMNS, INT8>(s, p, 0, own, raw, x, rounded);
    shared = &own;
  } else {
    for (int64_t t = thread; t < s.tokens; t += threads)
      prepare_decode<V, COLUMNS, INT8>(s, p, t, shared[t], raw, x, rounded);
#ifdef _OPENMP
#pragma omp barrier
#endif
  }
  // A thread may lose its core: units go to whoever is free.
  for (int64_t unit; (unit = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < units.count;)
    decode_unit<V, STEP, COLUMNS, INT8>(s, p, units, unit, shared, ends, sums);
}

}  // namespace
}  // namespace lopro
