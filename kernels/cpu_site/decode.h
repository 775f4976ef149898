// Few tokens: rows of packed codes times activations, read once and used at once.
#pragma once

#include "activation.h"
#include "codes.h"

namespace lopro {
namespace {

// Scales and scale * zero of rows row ... row + rows - 1, (rows, p.scales) each. Done for many rows at once, since a
// short row has few groups.
template <class V, int BITS>
void expand_scales(const Site& s, const Plan& p, int64_t row, int64_t rows, float* scales, float* shifts) {
  if (p.by_group) {
    int64_t first = row * s.groups, count = rows * s.groups;
    for (int64_t i = 0; i < count; i += 16) {
      typename V::F scale = V::load_f16(s.scales + first + i, static_cast<int>(least(16, count - i)));
      V::store(scales + i, scale);
      V::store(shifts + i, V::mul(scale, flat_zeros<V, BITS>(s, first + i)));
    }
    return;
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t b = 0; b < p.blocks; ++b) {
      int64_t group = (row + r) * s.groups + group_of(s, p, b);
      float scale = half_to_float(s.scales[group]);
      scales[r * p.scales + b] = scale;
      shifts[r * p.scales + b] = scale * (static_cast<float>(zero_code(s, group)) + 0.5f);
    }
}

// Blocks b ... b + n - 1 of a row of `expand_scales`; 0 behind the last.
template <class V>
LOPRO_INLINE inline typename V::F row_scales(const Plan& p, const float* scales, int64_t b, int n) {
  if (p.log_ratio == 0) return V::load_n(scales + b, n);
  int groups = (n + (1 << p.log_ratio) - 1) >> p.log_ratio;
  return V::permute(V::load_n(scales + (b >> p.log_ratio), groups), V::shr_by(V::iota(), p.log_ratio));
}

// Lanes whose sum is one row's product with T tokens; `order` is from `lane_blocks`, `line` holds a row.
template <class V, int BITS, bool INT8, int T>
LOPRO_INLINE inline void decode_row(const Site& s, const Plan& p, const Token* tokens, int64_t row, const float* scales,
                                    const float* shifts, const int32_t* order, uint8_t* line, typename V::F (&sum)[T]) {
  using C = Codes<BITS>;
  using F = typename V::F;
  using I = typename V::I;
  const uint8_t* codes = reinterpret_cast<const uint8_t*>(s.codes) + row * p.row_bytes;
  if (BITS == 3) {
    // Two planes are two streams in one page, which halves the bandwidth that the processor's prefetcher reaches.
    int64_t i = 0;
    for (; i + 64 <= p.row_bytes; i += 64) V::store_i(line + i, V::load_i(codes + i));
    std::memcpy(line + i, codes + i, static_cast<size_t>(p.row_bytes - i));
    codes = line;
  }
  F even[T], odd[T];
  repeat<T>([&](auto t) LOPRO_INLINE { even[t] = odd[t] = V::zero(); });
  for (int64_t b = 0; b < p.blocks; b += 16) {
    if (BITS != 3) {
      // The next row's part: the processor's own prefetcher stops at each page.
      int64_t part = (b << p.log_block) * BITS / 8;
      int64_t bytes = least(p.row_bytes - part, (int64_t{16} << p.log_block) * BITS / 8);
      const uint8_t* next = codes + (p.row_bytes > AHEAD ? p.row_bytes : AHEAD) + part;
      for (int64_t i = 0; i < bytes; i += 64) V::prefetch(next + i);
    }
    int n = static_cast<int>(least(16, p.blocks - b));
    F scale[T], own = row_scales<V>(p, scales, b, n), shift = row_scales<V>(p, shifts, b, n);
    repeat<T>([&](auto t) LOPRO_INLINE {
      odd[t] = V::fnma(shift, V::load(tokens[t].sums + b), odd[t]);
      scale[t] = INT8 ? V::mul(own, V::load(tokens[t].steps + b)) : own;
    });
    int64_t c = (b << p.log_block) / C::chunk, first = c, end = least(p.chunks, ((b + 16) << p.log_block) / C::chunk);
    auto step = [&](auto whole, int64_t c, F(&sum)[T]) LOPRO_INLINE {
      I low, high = V::zero_i(), block = V::load_i(order + (c - first) * 16);
      load_codes<V, BITS>(codes, p.plane, c, whole, low, high);
      if (INT8) {
        I dot[T];
        repeat<T>([&](auto t) LOPRO_INLINE { dot[t] = V::zero_i(); });
        repeat<C::fields>([&](auto f) LOPRO_INLINE {
          I bytes = field<V, BITS, f>(low, high);
          repeat<T>([&](auto t) LOPRO_INLINE {
            const int8_t* x = static_cast<const int8_t*>(tokens[t].x) + c * C::chunk + f * 64;
            dot[t] = V::template dot<BITS>(dot[t], bytes, V::load_i(x));
          });
        });
        repeat<T>([&](auto t) LOPRO_INLINE { sum[t] = V::fma(V::to_f(dot[t]), V::permute(scale[t], block), sum[t]); });
      } else {
        F dot[T], lanes = V::permute(own, block);
        repeat<T>([&](auto t) LOPRO_INLINE { dot[t] = V::zero(); });
        repeat<C::lane>([&](auto j) LOPRO_INLINE {
          F code = single<V, BITS, j>(low, high);
          repeat<T>([&](auto t) LOPRO_INLINE {
            const float* x = static_cast<const float*>(tokens[t].x) + c * C::chunk + j * 16;
            dot[t] = V::fma(code, V::load(x), dot[t]);
          });
        });
        repeat<T>([&](auto t) LOPRO_INLINE { sum[t] = V::fma(dot[t], lanes, sum[t]); });
      }
    };
    int64_t full = least(end, p.plane / 64);
    for (; c + 1 < full; c += 2) {
      step(std::true_type{}, c, even);
      step(std::true_type{}, c + 1, odd);
    }
    if (c < full) step(std::true_type{}, c++, even);
    if (c < end) step(std::false_type{}, c, odd);
  }
  repeat<T>([&](auto t) LOPRO_INLINE { sum[t] = V::add(even[t], odd[t]); });
}

// y of rows row ... row + R - 1 for T tokens, of which `count` are stored.
template <class V, int BITS, bool INT8, int R, int T>
void decode_rows(const Site& s, const Plan& p, const Token* tokens, int64_t token, int count, int64_t row,
                 const float* scales, const float* shifts, const int32_t* order, uint8_t* line) {
  using F = typename V::F;
  F sum[R][T];
  // One row after the other: the processor's own prefetcher follows one stream best.
  for (int r = 0; r < R; ++r)
    decode_row<V, BITS, INT8, T>(s, p, tokens, row + r, scales + r * p.scales, shifts + r * p.scales, order, line,
                                 sum[r]);
  if (s.rank) {
    // Rows of one call rarely cross into another part.
    int64_t part = part_of(s, row), last = part_of(s, row + R - 1);
    repeat<R>([&](auto r) LOPRO_INLINE {
      int64_t latent = (part == last ? part : part_of(s, row + r)) * p.lanes;
      for (int64_t j = 0; j < s.rank; j += 16) {
        int n = static_cast<int>(least(16, s.rank - j));
        int64_t at = (row + r) * s.rank + j;
        F up = s.up_type == Type::i8 ? V::load_i8(static_cast<const int8_t*>(s.up) + at, n)
                                     : V::load_f16(static_cast<const uint16_t*>(s.up) + at, n);
        repeat<T>([&](auto t) LOPRO_INLINE {
          sum[r][t] = V::fma(up, V::load(tokens[t].latent + latent + j), sum[r][t]);
        });
      }
    });
  }
  float result[T][R];
  repeat<T>([&](auto t) LOPRO_INLINE {
    if constexpr (R == 4) V::reduce4(sum[0][t], sum[1][t], sum[2][t], sum[3][t], result[t]);
    else repeat<R>([&](auto r) LOPRO_INLINE { result[t][r] = V::reduce(sum[r][t]); });
  });
  if (s.bias)
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) result[t][r] += load_scalar(s.bias, s.bias_type, row + r);
  for (int t = 0; t < T && t < count; ++t) {
    int64_t at = (token + t) * s.out + row;
    if (s.type == Type::f32) std::memcpy(static_cast<float*>(s.y) + at, result[t], sizeof(result[t]));
    else
      for (int r = 0; r < R; ++r) store_scalar(s.y, s.type, at + r, result[t][r]);
  }
}

// Rows row ... end - 1, whose expanded scales begin at `scales` and `shifts`.
template <class V, int BITS, bool INT8, int R, int T>
void decode_range(const Site& s, const Plan& p, const Token* tokens, int64_t token, int count, int64_t row,
                  int64_t end, const float* scales, const float* shifts, const int32_t* order, uint8_t* line) {
  for (; row + R <= end; row += R, scales += R * p.scales, shifts += R * p.scales)
    decode_rows<V, BITS, INT8, R, T>(s, p, tokens, token, count, row, scales, shifts, order, line);
  for (; row < end; ++row, scales += p.scales, shifts += p.scales)
    decode_rows<V, BITS, INT8, 1, T>(s, p, tokens, token, count, row, scales, shifts, order, line);
}

// Memory of one token in a decode call.
inline int64_t token_bytes(const Site& s, const Plan& p) {
  return p.columns * 4 + 2 * p.padded_blocks * 4 + (s.parts + 1) * (p.lanes + 16) * 4 + 512;
}

inline Token take_token(Scratch& scratch, const Site& s, const Plan& p) {
  Token token;
  token.x = scratch.take<float>(p.columns);
  token.steps = scratch.take<float>(p.padded_blocks);
  token.sums = scratch.take<float>(p.padded_blocks);
  token.latent = scratch.take<float>((s.parts > 1 ? s.parts : 1) * p.lanes + 16);
  return token;
}

template <class V, int BITS, bool INT8>
void prepare_decode(const Site& s, const Plan& p, int64_t index, Token& token, float* raw, float* x, int8_t* rounded) {
  using C = Codes<BITS>;
  rotate<V>(s, p, index, raw, x);
  if (s.rank) project<V, 1>(s, p, x, 0, &token);
  round_blocks<V, INT8>(p, x, rounded, token);
  if (INT8) {
    interleave<C::fields>(rounded, static_cast<int8_t*>(token.x), p.columns);
  } else {
    float* out = static_cast<float*>(token.x);
    for (int64_t c = 0; c < p.chunks; ++c)
      for (int j = 0; j < C::lane; ++j)
        for (int l = 0; l < 16; ++l) out[c * C::chunk + j * 16 + l] = x[c * C::chunk + l * C::lane + j];
  }
}

// Chunks of the widest codes in 16 of the widest blocks.
constexpr int64_t ORDERS = 32;

// Block, of the 16 at hand, that each lane of each of their chunks belongs to.
template <class V, int BITS>
void lane_blocks(const Plan& p, int32_t* order) {
  using C = Codes<BITS>;
  for (int64_t c = 0; c < ORDERS; ++c) {
    typename V::I column = V::add_i(V::template times<C::lane>(V::iota()), V::set_i(static_cast<int>(c * C::chunk)));
    V::store_i(order + c * 16, V::shr_by(column, p.log_block));
  }
}

template <class V, int BITS, bool INT8>
void decode(const Site& s, const Plan& p, int thread, int threads, Token* shared) {
  int64_t from = s.out * thread / threads / 4 * 4;
  int64_t to = thread + 1 == threads ? s.out : s.out * (thread + 1) / threads / 4 * 4;
  // Rows in runs whose scales, and with several tokens codes, stay in the first cache.
  int64_t run = s.tokens > 1 ? 16 : least(128, 4 + 512 / p.scales / 4 * 4);
  Scratch scratch(p.columns * 12 + 1024 + token_bytes(s, p) + 2 * (run * p.scales + 32) * 4 + ORDERS * 64 +
                  p.row_bytes + 64);
  float* raw = scratch.take<float>(p.columns + 16);
  float* x = scratch.take<float>(p.columns + 16);
  int8_t* rounded = scratch.take<int8_t>(p.columns);
  float* scales = scratch.take<float>(run * p.scales + 16);
  float* shifts = scratch.take<float>(run * p.scales + 16);
  int32_t* order = scratch.take<int32_t>(ORDERS * 16);
  uint8_t* line = scratch.take<uint8_t>(p.row_bytes);
  lane_blocks<V, BITS>(p, order);
  if (s.tokens == 1) {
    // Every thread prepares the one token for itself: that is shorter than waiting for another to do it.
    Token own = take_token(scratch, s, p);
    prepare_decode<V, BITS, INT8>(s, p, 0, own, raw, x, rounded);
    for (; from < to; from += run) {
      int64_t end = least(to, from + run);
      expand_scales<V, BITS>(s, p, from, end - from, scales, shifts);
      decode_range<V, BITS, INT8, V::rows, 1>(s, p, &own, 0, 1, from, end, scales, shifts, order, line);
    }
    return;
  }
  for (int64_t t = thread; t < s.tokens; t += threads)
    prepare_decode<V, BITS, INT8>(s, p, t, shared[t], raw, x, rounded);
#ifdef _OPENMP
#pragma omp barrier
#endif
  for (; from < to; from += run) {
    int64_t end = least(to, from + run);
    expand_scales<V, BITS>(s, p, from, end - from, scales, shifts);
    for (int64_t t = 0; t < s.tokens; t += 4) {
      int count = static_cast<int>(least(4, s.tokens - t));
      Token four[4];
      for (int i = 0; i < 4; ++i) four[i] = shared[t + (i < count ? i : 0)];
      if (count > 2)
        decode_range<V, BITS, INT8, V::shared_rows, 4>(s, p, four, t, count, from, end, scales, shifts, order, line);
      else
        for (int i = 0; i < count; ++i)
          decode_range<V, BITS, INT8, V::rows, 1>(s, p, four + i, t + i, 1, from, end, scales, shifts, order, line);
    }
  }
}

}  // namespace
}  // namespace lopro
