// Many tokens: unpacked panels of rows times tiles of tokens.
#pragma once

#include "codes.h"
#include "cpu/tiles.h"

namespace lopro {
namespace {

// Codes of 16 rows and one chunk: out[(field * 16 + lane) * stride], 16 rows of four bytes.
template <class V, int BITS>
void unpack_int8(const AffineSite& s, const Plan& p, int64_t row, int64_t c, uint8_t* out, int64_t stride) {
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
void unpack_float(const AffineSite& s, const Plan& p, int64_t row, int64_t c, int64_t at, const float* scales,
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
// `together` blocks of the activation, `block` columns in all, are summed up as integers.
template <class V, int BITS>
void multiply_int8(const uint8_t* panel, const uint32_t* x, const float* steps, const float* sums, const float* scales,
                   const float* shifts, int64_t chunks, int64_t blocks, int64_t block, int64_t together, int fields,
                   float* acc) {
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
      int64_t first = b * together;
      float all = sums[first * T + t];
      for (int64_t i = 1; i < together; ++i) all += sums[(first + i) * T + t];
      F step = V::set(steps[first * T + t]), sum = V::set(all);
      repeat<R>([&](auto r) LOPRO_INLINE {
        float* out = acc + (t * R + r) * 16;
        F value = V::fnma(V::load(shifts + (first * R + r) * 16), sum, V::load(out));
        V::store(out, V::fma(V::mul(V::to_f(dot[t][r]), step), V::load(scales + (first * R + r) * 16), value));
      });
    });
  }
}

// y of one panel of rows for tiles from ... to - 1.
// Inlined into the threads' loop, gcc 12's code for 4 bits and int8 takes 1.15 times as long.
template <class V, int BITS, bool INT8>
__attribute__((noinline)) void prefill_panel(const AffineSite& s, const Plan& p, const Tiles& all, int64_t panel_row,
                                             int64_t from, int64_t to, Scratch& scratch) {
  using C = Codes<BITS>;
  constexpr int R = V::panel, T = V::tile, P = R * 16;
  constexpr int64_t span = INT8 ? PANEL_COLUMNS : PANEL_COLUMNS / 2;
  char* start = scratch.data;
  float* acc = scratch.take<float>((to - from) * T * P);
  float* scales = scratch.take<float>(span / 32 * P);
  float* shifts = scratch.take<float>(span / 32 * P);
  float* up = scratch.take<float>(s.rank * P);
  float* panel = scratch.take<float>(span * P / (INT8 ? 4 : 1));
  start_panel<V>(s, p, all, panel_row, from, to, up, acc);
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
                         all.sums + (tile * p.padded_blocks + block) * T, scales, shifts, chunks,
                         ceil_div(blocks, p.together), p.block * p.together, p.together, C::fields, sums);
      else
        multiply_float<V>(panel, reinterpret_cast<const float*>(all.x) + (tile * all.words + k) * T,
                          least(span, s.in - k), sums);
    }
  }
  store_panel<V>(s, panel_row, from, to, acc);
  scratch.data = start;
}

template <class V, int BITS, bool INT8>
void prefill(const AffineSite& s, const Plan& p, int thread, int threads, const Tiles& all) {
  constexpr int64_t P = V::panel * 16;
  {
    Scratch scratch(tile_bytes<V>(p));
    for (int64_t tile = thread; tile < ceil_div(s.tokens, V::tile); tile += threads)
      prepare_tile<V, INT8>(s, p, tile, all, scratch, [&](const int8_t* rounded, Token& token) {
        interleave<Codes<BITS>::fields>(rounded, static_cast<int8_t*>(token.x), p.columns);
      });
  }
#ifdef _OPENMP
#pragma omp barrier
#endif
  Scratch scratch(tiles_at_once<V>(s, threads) * V::tile * P * 4 + PANEL_COLUMNS / 32 * P * 8 + s.rank * P * 4 +
                  PANEL_COLUMNS * P * 4 + 512);
  each_panel<V>(s, thread, threads, [&](int64_t row, int64_t from, int64_t to) {
    prefill_panel<V, BITS, INT8>(s, p, all, row, from, to, scratch);
  });
}

}  // namespace
}  // namespace lopro
