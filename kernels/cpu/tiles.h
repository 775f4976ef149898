// Many tokens: what surrounds the product of unpacked panels of rows and tiles of tokens.
#pragma once

#include "activation.h"

namespace lopro {
namespace {

// Activations of TILE tokens at a time, words of 4 bytes of the tokens side by side.
struct Tiles {
  uint32_t* x;     // (tiles, words, TILE): integers in the order of panels, or one fp32
  float* steps;    // (tiles, padded_blocks, TILE)
  float* sums;     // (tiles, padded_blocks, TILE)
  float* latents;  // (tiles, TILE, max(parts, 1), lanes)
  int64_t words;
};

// Memory of `prepare_tile`.
template <class V>
int64_t tile_bytes(const Sizes& p) {
  return (p.columns + 16) * 4 * (V::tile + 1) + p.columns * (2 * V::tile + 1) + V::tile * 2 * p.padded_blocks * 4 +
         64 * (4 * V::tile + 4);
}

// `arrange(rounded, token)` fills token.x from integers in the order of the columns: at most two bytes a column.
template <class V, bool INT8, class Arrange>
void prepare_tile(const Site& s, const Sizes& p, int64_t tile, const Tiles& all, Scratch& scratch, Arrange arrange) {
  constexpr int T = V::tile;
  char* start = scratch.data;
  float* raw = scratch.take<float>(p.columns + 16);
  float* x = scratch.take<float>((p.columns + 16) * T);
  int8_t* rounded = scratch.take<int8_t>(p.columns);
  int64_t latent = latent_size(s, p);
  Token tokens[T];
  for (int t = 0; t < T; ++t) {
    Token& token = tokens[t];
    token.x = scratch.take<int16_t>(p.columns);
    token.steps = scratch.take<float>(p.padded_blocks);
    token.sums = scratch.take<float>(p.padded_blocks);
    token.latent = all.latents + (tile * T + t) * latent;
    float* own = x + t * (p.columns + 16);
    if (tile * T + t < s.tokens) rotate<V>(s, p, tile * T + t, raw, own);
    else std::memset(own, 0, static_cast<size_t>(p.columns + 16) * 4);
    round_blocks<V, INT8>(p, own, s.largest, rounded, token);
    if (INT8) arrange(rounded, token);
    else token.x = own;
  }
  if (s.rank)
    for (int t = 0; t < T; t += 4) project<V, 4>(s, p, x + t * (p.columns + 16), p.columns + 16, tokens + t);
  uint32_t* out = all.x + tile * all.words * T;
  for (int64_t w = 0; w < all.words; ++w)
    for (int t = 0; t < T; ++t) out[w * T + t] = static_cast<const uint32_t*>(tokens[t].x)[w];
  for (int64_t b = 0; b < p.padded_blocks; ++b)
    for (int t = 0; t < T; ++t) {
      all.steps[(tile * p.padded_blocks + b) * T + t] = tokens[t].steps[b];
      all.sums[(tile * p.padded_blocks + b) * T + t] = tokens[t].sums[b];
    }
  scratch.data = start;
}

// Memory of `Tiles`, whose words hold `columns` columns each.
template <class V>
int64_t tiles_bytes(const Site& s, const Sizes& p, int64_t columns) {
  int64_t words = p.columns / columns + 2 * p.padded_blocks + latent_size(s, p);
  return ceil_div(s.tokens, V::tile) * V::tile * words * 4 + 512;
}

template <class V>
Tiles take_tiles(Scratch& scratch, const Site& s, const Sizes& p, int64_t columns) {
  int64_t tiles = ceil_div(s.tokens, V::tile);
  Tiles all;
  all.words = p.columns / columns;
  all.x = scratch.take<uint32_t>(tiles * all.words * V::tile);
  all.steps = scratch.take<float>(tiles * p.padded_blocks * V::tile);
  all.sums = scratch.take<float>(tiles * p.padded_blocks * V::tile);
  all.latents = scratch.take<float>(tiles * V::tile * latent_size(s, p));
  return all;
}

// acc (TILE, rows) += panel times one tile of fp32 tokens.
template <class V>
void multiply_float(const float* panel, const float* x, int64_t columns, float* acc) {
  using F = typename V::F;
  constexpr int R = V::panel, T = V::tile;
  F sum[T][R];
  repeat<T>([&](auto t) LOPRO_INLINE {
    repeat<R>([&](auto r) LOPRO_INLINE { sum[t][r] = V::load(acc + (t * R + r) * 16); });
  });
  for (int64_t k = 0; k < columns; ++k, panel += R * 16, x += T) {
    F w[R];
    repeat<R>([&](auto r) LOPRO_INLINE { w[r] = V::load(panel + r * 16); });
    repeat<T>([&](auto t) LOPRO_INLINE {
      F value = V::set(x[t]);
      repeat<R>([&](auto r) LOPRO_INLINE { sum[t][r] = V::fma(w[r], value, sum[t][r]); });
    });
  }
  repeat<T>([&](auto t) LOPRO_INLINE {
    repeat<R>([&](auto r) LOPRO_INLINE { V::store(acc + (t * R + r) * 16, sum[t][r]); });
  });
}

// acc (tokens, rows of a panel) = bias + low-rank branch, for tiles from ... to - 1; `up` holds rank * rows numbers.
template <class V>
void start_panel(const Site& s, const Sizes& p, const Tiles& all, int64_t panel_row, int64_t from, int64_t to,
                 float* up, float* acc) {
  using F = typename V::F;
  constexpr int R = V::panel, T = V::tile, P = R * 16;
  int64_t latent = latent_size(s, p);
  float bias[P];
  bool one_part = part_of(s, panel_row) == part_of(s, least(panel_row + P, s.out) - 1);
  for (int i = 0; i < P; ++i) {
    int64_t row = least(panel_row + i, s.out - 1);
    bias[i] = s.bias ? load_scalar(s.bias, s.bias_type, row) : 0.0f;
    for (int64_t r = 0; r < s.rank; ++r) up[r * P + i] = load_scalar(s.up, s.up_type, row * s.rank + r);
  }
  for (int64_t t = 0; t < (to - from) * T; ++t)
    for (int r = 0; r < R; ++r) {
      const float* own = all.latents + (from * T + t) * latent;
      if (s.rank && !one_part) {
        for (int i = 0; i < 16; ++i) {
          int64_t row = least(panel_row + r * 16 + i, s.out - 1);
          float value = bias[r * 16 + i];
          for (int64_t j = 0; j < s.rank; ++j) value += up[j * P + r * 16 + i] * own[part_of(s, row) * p.lanes + j];
          acc[(t * R + r) * 16 + i] = value;
        }
        continue;
      }
      F value = V::load(bias + r * 16);
      if (s.rank) own += part_of(s, panel_row) * p.lanes;
      for (int64_t j = 0; j < s.rank; ++j) value = V::fma(V::load(up + j * P + r * 16), V::set(own[j]), value);
      V::store(acc + (t * R + r) * 16, value);
    }
}

// y of a panel for tiles from ... to - 1.
template <class V>
void store_panel(const Site& s, int64_t panel_row, int64_t from, int64_t to, const float* acc) {
  constexpr int T = V::tile, P = V::panel * 16;
  int64_t rows = least(P, s.out - panel_row);
  for (int64_t t = from * T; t < least(to * T, s.tokens); ++t)
    store_run(s.y, s.type, row_of(s, t) * s.out + panel_row, acc + (t - from * T) * P, rows);
}

// Tiles that a thread multiplies a panel with at a time.
template <class V>
int64_t tiles_at_once(const Site& s, int threads) {
  int64_t tiles = ceil_div(s.tokens, V::tile), panels = ceil_div(s.out, V::panel * 16);
  // Few panels for many threads: tiles are divided too, otherwise threads would idle.
  return panels >= 4 * threads ? tiles : ceil_div(tiles, least(tiles, ceil_div(4 * threads, panels)));
}

// Calls panel(row, from, to) for the panels and tiles of one thread.
template <class V, class Panel>
void each_panel(const Site& s, int thread, int threads, Panel panel) {
  int64_t tiles = ceil_div(s.tokens, V::tile), each = tiles_at_once<V>(s, threads), cuts = ceil_div(tiles, each);
  int64_t jobs = ceil_div(s.out, V::panel * 16) * cuts;
  for (int64_t job = jobs * thread / threads; job < jobs * (thread + 1) / threads; ++job) {
    int64_t from = job % cuts * each;
    panel(job / cuts * V::panel * 16, from, least(tiles, from + each));
  }
}

}  // namespace
}  // namespace lopro
