// Many tokens: unpacked panels of rows times tiles of tokens.
#pragma once

#include "activation.h"
#include "codes.h"

namespace lopro {
namespace {

// Activations of TILE tokens at a time, words of 4 bytes of the tokens side by side.
struct Tiles {
  uint32_t* x;     // (tiles, words, TILE): four int8 in the order of panels, or one fp32
  float* steps;    // (tiles, padded_blocks, TILE)
  float* sums;     // (tiles, padded_blocks, TILE)
  float* latents;  // (tiles, TILE, max(parts, 1), lanes)
  int64_t words;
};

template <class V, int BITS, bool INT8>
void prepare_tile(const Site& s, const Plan& p, int64_t tile, const Tiles& all, char* memory) {
  constexpr int T = V::tile;
  Scratch* scratch = reinterpret_cast<Scratch*>(memory);
  char* start = scratch->data;
  float* raw = scratch->take<float>(p.columns + 16);
  float* x = scratch->take<float>((p.columns + 16) * T);
  int8_t* rounded = scratch->take<int8_t>(p.columns);
  int64_t latent = (s.parts > 1 ? s.parts : 1) * p.lanes;
  Token tokens[T];
  for (int t = 0; t < T; ++t) {
    Token& token = tokens[t];
    token.x = scratch->take<int8_t>(p.columns);
    token.steps = scratch->take<float>(p.padded_blocks);
    token.sums = scratch->take<float>(p.padded_blocks);
    token.latent = all.latents + (tile * T + t) * latent;
    float* own = x + t * (p.columns + 16);
    if (tile * T + t < s.tokens) rotate<V>(s, p, tile * T + t, raw, own);
    else std::memset(own, 0, static_cast<size_t>(p.columns + 16) * 4);
    round_blocks<V, INT8>(p, own, rounded, token);
    if (INT8) interleave<Codes<BITS>::fields>(rounded, static_cast<int8_t*>(token.x), p.columns);
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
  scratch->data = start;
}

// Codes of 16 rows and one chunk: out[(field * 16 + lane) * stride], 16 rows of four bytes.
template <class V, int BITS>
void unpack_int8(const Site& s, const Plan& p, int64_t row, int64_t c, uint8_t* out, int64_t stride) {
  using C = Codes<BITS>;
  typename V::I low[16], high[16];
  bool whole = c * 64 + 64 <= p.plane;
  for (int i = 0; i < 16; ++i) {
    const uint8_t* codes = reinterpret_cast<const uint8_t*>(s.codes) + least(row + i, s.out - 1) * p.row_bytes;
    load_codes<V, BITS>(codes, p.plane, c, whole, low[i], high[i]);
  }
  V::transpose(low);
  if (BITS == 3) V::transpose(high);
  for (int l = 0; l < 16; ++l) {
    repeat<C::fields>([&](auto f) LOPRO_INLINE {
      V::store_i(out + (f * 16 + l) * stride, field<V, BITS, f>(low[l], high[l]));
    });
  }
}

// Weights of 16 rows and one chunk in fp32: out[column * stride], 16 rows; `scales` and `shifts` begin at the panel's
// first block, the chunk's column there is `at`.
template <class V, int BITS>
void unpack_float(const Site& s, const Plan& p, int64_t row, int64_t c, int64_t at, const float* scales,
                  const float* shifts, float* out, int64_t stride) {
  using C = Codes<BITS>;
  typename V::I low[16], high[16];
  bool whole = c * 64 + 64 <= p.plane;
  for (int i = 0; i < 16; ++i) {
    const uint8_t* codes = reinterpret_cast<const uint8_t*>(s.codes) + least(row + i, s.out - 1) * p.row_bytes;
    load_codes<V, BITS>(codes, p.plane, c, whole, low[i], high[i]);
  }
  V::transpose(low);
  if (BITS == 3) V::transpose(high);
  for (int l = 0; l < 16; ++l) {
    int64_t block = (at + l * C::lane) >> p.log_block;
    typename V::F scale = V::load(scales + block * stride), shift = V::load(shifts + block * stride);
    repeat<C::lane>([&](auto j) LOPRO_INLINE {
      V::store(out + (l * C::lane + j) * stride, V::fms(single<V, BITS, j>(low[l], high[l]), scale, shift));
    });
  }
}

// acc (TILE, rows) += panel times one tile of int8 tokens; `x`, `steps` and `sums` begin at the panel's first column.
template <class V, int BITS>
void multiply_int8(const uint8_t* panel, const uint32_t* x, const float* steps, const float* sums, const float* scales,
                   const float* shifts, int64_t chunks, int64_t blocks, int64_t block, int fields, float* acc) {
  using F = typename V::F;
  using I = typename V::I;
  constexpr int R = V::panel, T = V::tile;
  int64_t lane = 4 * fields, chunk = 16 * lane;
  int64_t lanes = block < chunk ? block / lane : 16, each = block < chunk ? 1 : block / chunk;
  for (int64_t b = 0; b < blocks; ++b) {
    I dot[T][R];
    repeat<T>([&](auto t) LOPRO_INLINE {
      repeat<R>([&](auto r) LOPRO_INLINE { dot[t][r] = V::zero_i(); });
    });
    int64_t c = b * block / chunk, end = least(c + each, chunks), first = b * block % chunk / lane;
    for (; c < end; ++c)
      for (int f = 0; f < fields; ++f) {
        const uint8_t* w = panel + ((c * fields + f) * 16 + first) * R * 64;
        const uint32_t* a = x + ((c * fields + f) * 16 + first) * T;
        for (int64_t l = 0; l < lanes; ++l, w += R * 64, a += T) {
          I codes[R];
          repeat<R>([&](auto r) LOPRO_INLINE { codes[r] = V::load_i(w + r * 64); });
          repeat<T>([&](auto t) LOPRO_INLINE {
            I four = V::set_i(static_cast<int>(a[t]));
            repeat<R>([&](auto r) LOPRO_INLINE { dot[t][r] = V::template dot<BITS>(dot[t][r], codes[r], four); });
          });
        }
      }
    repeat<T>([&](auto t) LOPRO_INLINE {
      F step = V::set(steps[b * T + t]), sum = V::set(sums[b * T + t]);
      repeat<R>([&](auto r) LOPRO_INLINE {
        float* out = acc + (t * R + r) * 16;
        F value = V::fnma(V::load(shifts + (b * R + r) * 16), sum, V::load(out));
        V::store(out, V::fma(V::mul(V::to_f(dot[t][r]), step), V::load(scales + (b * R + r) * 16), value));
      });
    });
  }
}

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

// y of one panel of rows for tiles from ... to - 1.
template <class V, int BITS, bool INT8>
void prefill_panel(const Site& s, const Plan& p, const Tiles& all, int64_t panel_row, int64_t from, int64_t to,
                   Scratch& scratch) {
  using C = Codes<BITS>;
  using F = typename V::F;
  constexpr int R = V::panel, T = V::tile, P = R * 16;
  constexpr int64_t span = INT8 ? PANEL_COLUMNS : PANEL_COLUMNS / 2;
  char* start = scratch.data;
  float* acc = scratch.take<float>((to - from) * T * P);
  float* scales = scratch.take<float>(span / 32 * P);
  float* shifts = scratch.take<float>(span / 32 * P);
  float* up = scratch.take<float>(s.rank * P);
  float* panel = scratch.take<float>(span * P / (INT8 ? 4 : 1));
  int64_t latent = (s.parts > 1 ? s.parts : 1) * p.lanes;

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

  for (int64_t k = 0; k < s.in; k += span) {
    int64_t first = k / C::chunk, chunks = least(p.chunks, (k + span) / C::chunk) - first;
    int64_t block = k >> p.log_block, blocks = least(p.blocks, (k + span) >> p.log_block) - block;
    for (int i = 0; i < P; ++i) {
      int64_t row = least(panel_row + i, s.out - 1);
      for (int64_t b = 0; b < span >> p.log_block; ++b) {
        int64_t group = row * s.groups + group_of(s, p, least(block + b, p.blocks - 1));
        float scale = load_scalar(s.scales, s.scales_type, group);
        scales[b * P + i] = scale;
        shifts[b * P + i] = scale * (static_cast<float>(zero_code(s, group)) + 0.5f);
      }
    }
    for (int64_t c = 0; c < chunks; ++c)
      for (int r = 0; r < R; ++r)
        if (INT8)
          unpack_int8<V, BITS>(s, p, panel_row + r * 16, first + c,
                               reinterpret_cast<uint8_t*>(panel) + (c * C::fields * 16 * R + r) * 64, R * 64);
        else
          unpack_float<V, BITS>(s, p, panel_row + r * 16, first + c, c * C::chunk, scales + r * 16, shifts + r * 16,
                                panel + c * C::chunk * P + r * 16, P);
    for (int64_t tile = from; tile < to; ++tile) {
      float* sums = acc + (tile - from) * T * P;
      if (INT8)
        multiply_int8<V, BITS == 8 ? 8 : 4>(reinterpret_cast<uint8_t*>(panel), all.x + (tile * all.words + k / 4) * T,
                         all.steps + (tile * p.padded_blocks + block) * T,
                         all.sums + (tile * p.padded_blocks + block) * T, scales, shifts, chunks, blocks, p.block,
                         C::fields, sums);
      else
        multiply_float<V>(panel, reinterpret_cast<const float*>(all.x) + (tile * all.words + k) * T,
                          least(span, s.in - k), sums);
    }
  }
  int64_t rows = least(P, s.out - panel_row);
  for (int64_t t = from * T; t < least(to * T, s.tokens); ++t)
    for (int64_t i = 0; i < rows; ++i)
      store_scalar(s.y, s.type, t * s.out + panel_row + i, acc[(t - from * T) * P + i]);
  scratch.data = start;
}

template <class V, int BITS, bool INT8>
void prefill(const Site& s, const Plan& p, int thread, int threads, const Tiles& all) {
  constexpr int T = V::tile, P = V::panel * 16;
  int64_t tiles = ceil_div(s.tokens, T), panels = ceil_div(s.out, P);
  {
    Scratch scratch((p.columns + 16) * 4 * (T + 1) + p.columns * (T + 1) + T * 2 * p.padded_blocks * 4 +
                    64 * (4 * T + 4));
    for (int64_t tile = thread; tile < tiles; tile += threads)
      prepare_tile<V, BITS, INT8>(s, p, tile, all, reinterpret_cast<char*>(&scratch));
  }
#ifdef _OPENMP
#pragma omp barrier
#endif
  // Few panels for many threads: tiles are divided too, otherwise threads would idle.
  int64_t cuts = panels >= 4 * threads ? 1 : least(tiles, ceil_div(4 * threads, panels));
  int64_t each = ceil_div(tiles, cuts), jobs = panels * cuts;
  Scratch scratch(each * T * P * 4 + PANEL_COLUMNS / 32 * P * 8 + s.rank * P * 4 + PANEL_COLUMNS * P * 4 + 512);
  for (int64_t job = jobs * thread / threads; job < jobs * (thread + 1) / threads; ++job) {
    int64_t from = job % cuts * each, to = least(tiles, from + each);
    if (from < to) prefill_panel<V, BITS, INT8>(s, p, all, job / cuts * P, from, to, scratch);
  }
}

}  // namespace
}  // namespace lopro
