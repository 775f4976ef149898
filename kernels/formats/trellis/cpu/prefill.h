// Many tokens: unpacked panels of rows times tiles of tokens.
#pragma once

#include "cpu/tiles.h"
#include "states.h"

namespace lopro {
namespace {

// Byte sums of 16 rows as int16, two columns a word: out[word * stride], 16 rows. Exact, and half as long as the bytes.
template <class V, int STEP, int COLUMNS>
void unpack_pairs(const uint8_t* codes, int64_t string, int mask, int64_t states, uint8_t* out, int64_t stride) {
  using I = typename V::I;
  for (int64_t c = 0; c < states; c += 3 - COLUMNS, codes += (3 - COLUMNS) * string, out += stride) {
    I sums = V::template sums<COLUMNS>(products<V, STEP>(codes, mask));
    if (COLUMNS == 1 && c + 1 < states)
      sums = V::add_i(sums, V::template shl<16>(V::template sums<1>(products<V, STEP>(codes + string, mask))));
    V::store_i(out, sums);
  }
}

// Weights of 16 rows in fp32: out[column * stride], 16 rows.
template <class V, int STEP, int COLUMNS>
void unpack_float(const uint8_t* codes, int64_t string, int mask, int64_t states, const float* scales, float* out,
                  int64_t stride) {
  using F = typename V::F;
  const F scale = V::load(scales);
  for (int64_t c = 0; c < states; ++c, codes += string, out += COLUMNS * stride) {
    F unit[COLUMNS];
    units<V, COLUMNS>(products<V, STEP>(codes, mask), unit);
    repeat<COLUMNS>([&](auto j) LOPRO_INLINE { V::store(out + j * stride, V::mul(unit[j], scale)); });
  }
}

// acc (TILE, rows) += panel of `words` words times one tile of int16 tokens; `x`, `steps` and `sums` begin at the
// panel's first column.
template <class V>
void multiply_pairs(const uint8_t* panel, const uint32_t* x, const float* steps, const float* sums, const float* scales,
                    int64_t words, int64_t each, float* acc) {
  using F = typename V::F;
  using I = typename V::I;
  constexpr int R = V::panel, T = V::tile;
  for (; words > 0; words -= each, steps += T, sums += T) {
    I dot[T][R];
    repeat<T>([&](auto t) LOPRO_INLINE { repeat<R>([&](auto r) LOPRO_INLINE { dot[t][r] = V::zero_i(); }); });
    for (int64_t w = least(each, words); w > 0; --w, panel += R * 64, x += T) {
      I weights[R];
      repeat<R>([&](auto r) LOPRO_INLINE { weights[r] = V::load_i(panel + r * 64); });
      repeat<T>([&](auto t) LOPRO_INLINE {
        I two = V::set_i(static_cast<int>(x[t]));
        repeat<R>([&](auto r) LOPRO_INLINE {
          dot[t][r] = V::dot_halves(dot[t][r], weights[r], two);
          V::hold(dot[t][r]);
        });
      });
    }
    repeat<T>([&](auto t) LOPRO_INLINE {
      F step = V::set(steps[t]), centre = V::set(sums[t]);
      repeat<R>([&](auto r) LOPRO_INLINE {
        float* out = acc + (t * R + r) * 16;
        F value = V::mul(V::add(V::to_f(dot[t][r]), centre), step);
        V::store(out, V::fma(value, V::load(scales + r * 16), V::load(out)));
      });
    });
  }
}

// y of one panel of rows for tiles from ... to - 1.
template <class V, int STEP, int COLUMNS, bool INT8>
void prefill_panel(const TrellisSite& s, const Plan& p, const Tiles& all, int64_t panel_row, int64_t from, int64_t to,
                   Scratch& scratch) {
  constexpr int R = V::panel, T = V::tile, P = R * 16;
  constexpr int64_t span = INT8 ? PANEL_COLUMNS : PANEL_COLUMNS / 2;
  char* start = scratch.data;
  float* acc = scratch.take<float>((to - from) * T * P);
  float* up = scratch.take<float>(s.rank * P);
  float* panel = scratch.take<float>(span * P / (INT8 ? 2 : 1));
  uint8_t* ends = scratch.take<uint8_t>(span / COLUMNS * Ends<STEP>::stride);
  start_panel<V>(s, p, all, panel_row, from, to, up, acc);

  float scales[P];
  for (int i = 0; i < P; ++i)
    scales[i] = load_scalar(s.scales, s.scales_type, least(panel_row + i, s.out - 1)) * UNIT;
  // Strips begin at multiples of 32 rows, so a panel lies in one.
  Strip strip = strip_at(s, p, least(panel_row / s.strip, s.strips - 1));
  int64_t row = panel_row - strip.row, whole = round_up(strip.rows, 32) - 32;
  int mask = (1 << s.window) - 1;
  for (int64_t k = 0; k < s.in; k += span) {
    int64_t first = k / COLUMNS, states = least(span / COLUMNS, p.states - first), string = strip.stride;
    const uint8_t* codes = strip.codes + first * string + row / 8 * STEP;
    if (row >= whole) {
      Ends<STEP>::copy(strip, first, states, ends);
      codes = ends + (row - whole) / 8 * STEP;
      string = Ends<STEP>::stride;
    }
    for (int r = 0; r < R; ++r)
      if (INT8)
        unpack_pairs<V, STEP, COLUMNS>(codes + r * 2 * STEP, string, mask, states,
                                       reinterpret_cast<uint8_t*>(panel) + r * 64, R * 64);
      else
        unpack_float<V, STEP, COLUMNS>(codes + r * 2 * STEP, string, mask, states, scales + r * 16, panel + r * 16, P);
    int64_t block = k >> p.log_block;
    for (int64_t tile = from; tile < to; ++tile) {
      float* sums = acc + (tile - from) * T * P;
      if (INT8)
        multiply_pairs<V>(reinterpret_cast<uint8_t*>(panel), all.x + (tile * all.words + k / 2) * T,
                          all.steps + (tile * p.padded_blocks + block) * T,
                          all.sums + (tile * p.padded_blocks + block) * T, scales, ceil_div(states * COLUMNS, 2),
                          p.block / 2, sums);
      else
        multiply_float<V>(panel, reinterpret_cast<const float*>(all.x) + (tile * all.words + k) * T,
                          least(span, s.in - k), sums);
    }
  }
  store_panel<V>(s, panel_row, from, to, acc);
  scratch.data = start;
}

template <class V, int STEP, int COLUMNS, bool INT8>
void prefill(const TrellisSite& s, const Plan& p, int thread, int threads, const Tiles& all) {
  constexpr int64_t P = V::panel * 16;
  {
    Scratch scratch(tile_bytes<V>(p));
    for (int64_t tile = thread; tile < ceil_div(s.tokens, V::tile); tile += threads)
      prepare_tile<V, INT8>(s, p, tile, all, scratch, [&](const int8_t* rounded, Token& token) {
        uint32_t* words = static_cast<uint32_t*>(token.x);
        for (int64_t w = 0; w < p.columns / 2; ++w) words[w] = pair(rounded[2 * w], rounded[2 * w + 1]);
        centre_sums<COLUMNS>(p, rounded, token);
      });
  }
#ifdef _OPENMP
#pragma omp barrier
#endif
  Scratch scratch(tiles_at_once<V>(s, threads) * V::tile * P * 4 + s.rank * P * 4 + PANEL_COLUMNS * P * 2 +
                  PANEL_COLUMNS * Ends<STEP>::stride + 1024);
  each_panel<V>(s, thread, threads, [&](int64_t row, int64_t from, int64_t to) {
    prefill_panel<V, STEP, COLUMNS, INT8>(s, p, all, row, from, to, scratch);
  });
}

}  // namespace
}  // namespace lopro
