// Few tokens: rows of packed codes times activations, read once and used at once.
#pragma once

#include "codes.h"
#include "cpu/activation.h"

namespace lopro {
namespace {

// Prefetch distance in bytes where `rows` rows are multiplied together: at least as many rows.
inline int64_t ahead(const Plan& p, int64_t rows) { return p.row_bytes * rows > 8192 ? p.row_bytes * rows : 8192; }

// Prefetches what rows row ... row + rows - 1 need besides their codes.
template <class V>
void fetch_rows(const AffineSite& s, int64_t row, int64_t rows) {
  int64_t scale_bytes = s.groups * (s.scales_type == Type::f32 ? 4 : 2);
  fetch<V>(static_cast<const char*>(s.scales) + row * scale_bytes, rows * scale_bytes);
  fetch<V>(reinterpret_cast<const char*>(s.zeros) + row * s.groups * s.bits / 8, rows * s.groups * s.bits / 8);
  if (s.rank) {
    int64_t each = s.rank * (s.up_type == Type::i8 ? 1 : 2);
    fetch<V>(static_cast<const char*>(s.up) + row * each, rows * each);
  }
}

// Scales and scale * zero of rows row ... row + rows - 1, (rows, p.scales) each. Done for many rows at once, since a
// short row has few groups.
template <class V, int BITS>
void expand_scales(const AffineSite& s, const Plan& p, int64_t row, int64_t rows, float* scales, float* shifts) {
  if (p.by_group) {
    int64_t first = row * s.groups, count = rows * s.groups;
    const FlatZeros<V, BITS> zeros(s, first);
    for (int64_t i = 0; i < count; i += 16) {
      int n = static_cast<int>(least(16, count - i));
      typename V::F scale = s.scales_type == Type::f32
                                ? V::load_n(static_cast<const float*>(s.scales) + first + i, n)
                                : V::load_f16(static_cast<const uint16_t*>(s.scales) + first + i, n);
      V::store(scales + i, scale);
      V::store(shifts + i, V::mul(scale, zeros(first + i)));
    }
    return;
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t b = 0; b < p.blocks; ++b) {
      int64_t group = (row + r) * s.groups + group_of(s, p, b);
      float scale = load_scalar(s.scales, s.scales_type, group);
      scales[r * p.scales + b] = scale;
      shifts[r * p.scales + b] = scale * (static_cast<float>(zero_code(s, group)) + 0.5f);
    }
}

// Combines the scales of `rows` rows with T tokens, (T, rows, p.stride) each: `weights` multiply each block's product,
// `offsets` are subtracted from a row's sum. Many rows at once, before the first is used: a load from a store that is
// still in the queue would wait for every load of codes before it.
template <class V, bool INT8, int T>
void weigh(const Plan& p, const Token* tokens, int64_t rows, const float* scales, const float* shifts, float* weights,
           float* offsets) {
  using F = typename V::F;
  using I = typename V::I;
  for (int t = 0; t < T; ++t, weights += rows * p.stride, offsets += rows * p.stride) {
    if (p.log_ratio == 0) {
      // Rows lie without gaps, so vectors may cross from one into the next, where steps and sums begin again.
      int64_t turn = 16 % p.blocks;
      for (int64_t i = 0, b = 0; i < rows * p.blocks; i += 16) {
        F scale = V::load(scales + i);
        V::store(weights + i, INT8 ? V::mul(scale, V::load(tokens[t].steps + b)) : scale);
        V::store(offsets + i, V::mul(V::load(shifts + i), V::load(tokens[t].sums + b)));
        b += turn;
        if (b >= p.blocks) b -= p.blocks;
      }
      continue;
    }
    const I index = V::shr_by(V::iota(), p.log_ratio);
    for (int64_t b = 0; b < p.blocks; b += 16) {
      int groups = static_cast<int>((least(16, p.blocks - b) + (1 << p.log_ratio) - 1) >> p.log_ratio);
      F steps = V::load(tokens[t].steps + b), sums = V::load(tokens[t].sums + b);
      for (int64_t r = 0; r < rows; ++r) {
        int64_t at = r * p.scales + (b >> p.log_ratio);
        F scale = V::permute(V::load_n(scales + at, groups), index);
        F shift = V::permute(V::load_n(shifts + at, groups), index);
        V::store(weights + r * p.stride + b, INT8 ? V::mul(scale, steps) : scale);
        V::store(offsets + r * p.stride + b, V::mul(shift, sums));
      }
    }
  }
}

// Lanes whose sums are the products of R rows with T tokens, without the low-rank branch; weights and offsets are
// those of `weigh`, of `rows` rows. SINGLE: a chunk lies in one block.
template <class V, int BITS, bool INT8, int R, int T, bool SINGLE>
LOPRO_INLINE inline void multiply_rows(const AffineSite& s, const Plan& p, const Token* tokens, int64_t row,
                                       int64_t rows, const float* weights, const float* offsets,
                                       typename V::F (&sum)[R][T]) {
  using C = Codes<BITS>;
  using F = typename V::F;
  using I = typename V::I;
  constexpr int bytes = BITS == 3 ? 96 : 64, lines = (R * bytes + 63) / 64;
  const uint8_t* codes = reinterpret_cast<const uint8_t*>(s.codes) + row * p.row_bytes;
  const I lanes = V::shr_by(V::template times<C::lane>(V::iota()), p.log_block);
  const uint8_t* next = codes + ahead(p, R);
  repeat<R>([&](auto r) LOPRO_INLINE {
    repeat<T>([&](auto t) LOPRO_INLINE { sum[r][t] = V::zero(); });
  });
  for (int64_t b = 0; b < p.blocks; b += 16) {
    int n = static_cast<int>(least(16, p.blocks - b));
    repeat<R>([&](auto r) LOPRO_INLINE {
      repeat<T>([&](auto t) LOPRO_INLINE {
        sum[r][t] = V::sub(sum[r][t], V::load_n(offsets + (t * rows + r) * p.stride + b, n));
      });
    });
  }
  auto step = [&](auto whole, int64_t c) LOPRO_INLINE {
    I low[R], high[R];
    repeat<R>([&](auto r) LOPRO_INLINE {
      load_codes<V, BITS>(codes + r * p.row_bytes, p.plane, c, whole, low[r], high[r]);
    });
    // The rows are contiguous, and so is what the next steps read.
    repeat<lines>([&](auto i) LOPRO_INLINE { V::fetch(next + c * (R * bytes) + i * 64); });
    int64_t block = c * C::chunk >> p.log_block;
    I index = SINGLE ? lanes : V::add_i(lanes, V::set_i(static_cast<int>(block & 15)));
    auto weight = [&](int r, int t) LOPRO_INLINE {
      const float* own = weights + (t * rows + r) * p.stride;
      if (SINGLE) return V::set(own[block]);
      int64_t first = block & ~int64_t{15};
      // After a row's last block come the next row's weights, which may be NaN.
      F some = whole ? V::load(own + first) : V::load_n(own + first, static_cast<int>(p.blocks - first));
      return V::permute(some, index);
    };
    if (INT8) {
      I dot[R][T];
      repeat<R>([&](auto r) LOPRO_INLINE {
        repeat<T>([&](auto t) LOPRO_INLINE { dot[r][t] = V::zero_i(); });
      });
      repeat<C::fields>([&](auto f) LOPRO_INLINE {
        I x[T];
        repeat<T>([&](auto t) LOPRO_INLINE {
          x[t] = V::load_i(static_cast<const int8_t*>(tokens[t].x) + c * C::chunk + f * 64);
        });
        repeat<R>([&](auto r) LOPRO_INLINE {
          I bytes = field<V, BITS, f>(low[r], high[r]);
          repeat<T>([&](auto t) LOPRO_INLINE { dot[r][t] = V::template dot<BITS>(dot[r][t], bytes, x[t]); });
        });
      });
      repeat<R>([&](auto r) LOPRO_INLINE {
        repeat<T>([&](auto t) LOPRO_INLINE { sum[r][t] = V::fma(V::to_f(dot[r][t]), weight(r, t), sum[r][t]); });
      });
    } else {
      F dot[R][T];
      repeat<R>([&](auto r) LOPRO_INLINE {
        repeat<T>([&](auto t) LOPRO_INLINE { dot[r][t] = V::zero(); });
      });
      repeat<C::lane>([&](auto j) LOPRO_INLINE {
        F x[T];
        repeat<T>([&](auto t) LOPRO_INLINE {
          x[t] = V::load(static_cast<const float*>(tokens[t].x) + c * C::chunk + j * 16);
        });
        repeat<R>([&](auto r) LOPRO_INLINE {
          F code = single<V, BITS, j>(low[r], high[r]);
          repeat<T>([&](auto t) LOPRO_INLINE { dot[r][t] = V::fma(code, x[t], dot[r][t]); });
        });
      });
      repeat<R>([&](auto r) LOPRO_INLINE {
        repeat<T>([&](auto t) LOPRO_INLINE { sum[r][t] = V::fma(dot[r][t], weight(r, 0), sum[r][t]); });
      });
    }
  };
  int64_t full = p.plane / 64;
  for (int64_t c = 0; c < full; ++c) step(std::true_type{}, c);
  if (full < p.chunks) step(std::false_type{}, full);
}

// y of rows row ... row + R - 1 for T tokens, of which `count` are stored.
template <class V, int BITS, bool INT8, int R, int T>
void decode_rows(const AffineSite& s, const Plan& p, const Token* tokens, int64_t token, int count, int64_t row,
                 int64_t rows, const float* weights, const float* offsets) {
  using F = typename V::F;
  F sum[R][T];
  if (Codes<BITS>::chunk <= p.block)
    multiply_rows<V, BITS, INT8, R, T, true>(s, p, tokens, row, rows, weights, offsets, sum);
  else
    multiply_rows<V, BITS, INT8, R, T, false>(s, p, tokens, row, rows, weights, offsets, sum);
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
    int64_t at = row_of(s, token + t) * s.out + row;
    if (s.type == Type::f32) std::memcpy(static_cast<float*>(s.y) + at, result[t], sizeof(result[t]));
    else
      for (int r = 0; r < R; ++r) store_scalar(s.y, s.type, at + r, result[t][r]);
  }
}

// Rows row ... end - 1, whose expanded scales begin at `scales` and `shifts`.
template <class V, int BITS, bool INT8, int R, int T>
void decode_range(const AffineSite& s, const Plan& p, const Token* tokens, int64_t token, int count, int64_t row,
                  int64_t end, const float* scales, const float* shifts, float* weights, float* offsets) {
  int64_t rows = end - row;
  weigh<V, INT8, T>(p, tokens, rows, scales, shifts, weights, offsets);
  for (; row + R <= end; row += R, weights += R * p.stride, offsets += R * p.stride)
    decode_rows<V, BITS, INT8, R, T>(s, p, tokens, token, count, row, rows, weights, offsets);
  for (; row < end; ++row, weights += p.stride, offsets += p.stride)
    decode_rows<V, BITS, INT8, 1, T>(s, p, tokens, token, count, row, rows, weights, offsets);
}

// Memory of one token in a decode call.
inline int64_t token_bytes(const AffineSite& s, const Plan& p) {
  return p.columns * 4 + 2 * (p.padded_blocks + 16) * 4 + (s.parts + 1) * (p.lanes + 16) * 4 + 512;
}

inline Token take_token(Scratch& scratch, const AffineSite& s, const Plan& p) {
  Token token;
  token.x = scratch.take<float>(p.columns);
  token.steps = scratch.take<float>(p.padded_blocks + 16);
  token.sums = scratch.take<float>(p.padded_blocks + 16);
  token.latent = scratch.take<float>(latent_size(s, p) + 16);
  return token;
}

template <class V, int BITS, bool INT8>
void prepare_decode(const AffineSite& s, const Plan& p, int64_t index, Token& token, float* raw, float* x,
                    int8_t* rounded) {
  using C = Codes<BITS>;
  rotate<V>(s, p, index, raw, x);
  if (s.rank) project<V, 1>(s, p, x, 0, &token);
  round_blocks<V, INT8>(p, x, s.largest, rounded, token);
  if (p.log_ratio == 0)
    for (int64_t b = p.blocks; b < p.blocks + 16; ++b) {
      token.steps[b] = token.steps[b - p.blocks];
      token.sums[b] = token.sums[b - p.blocks];
    }
  if (INT8) {
    interleave<C::fields>(rounded, static_cast<int8_t*>(token.x), p.columns);
  } else {
    float* out = static_cast<float*>(token.x);
    for (int64_t c = 0; c < p.chunks; ++c)
      for (int j = 0; j < C::lane; ++j)
        for (int l = 0; l < 16; ++l) out[c * C::chunk + j * 16 + l] = x[c * C::chunk + l * C::lane + j];
  }
}

// Rows that thread `thread` begins with: its part of the first `rows`, in fours.
inline int64_t first_row(int64_t rows, int thread, int threads) {
  return thread == threads ? rows : rows * thread / threads / 4 * 4;
}

// Work of one thread. `next` counts the rows that free threads have taken.
template <class V, int BITS, bool INT8>
void decode(const AffineSite& s, const Plan& p, int thread, int threads, Token* shared, int64_t* next) {
  constexpr int R = V::template rows<BITS>;
  // Runs of rows whose scales, and with several tokens codes, stay in L1.
  int64_t run = s.tokens > 1 ? 16 : least(128, 4 + 512 / p.scales / 4 * 4);
  int64_t held = s.tokens > 1 ? 4 * run : run;
  Scratch scratch(p.columns * 12 + 1024 + token_bytes(s, p) + 2 * (run * p.scales + 32) * 4 +
                  2 * (held * p.stride + 32) * 4);
  float* raw = scratch.take<float>(p.columns + 16);
  float* x = scratch.take<float>(p.columns + 16);
  int8_t* rounded = scratch.take<int8_t>(p.columns);
  float* scales = scratch.take<float>(run * p.scales + 16);
  float* shifts = scratch.take<float>(run * p.scales + 16);
  float* weights = scratch.take<float>(held * p.stride + 16);
  float* offsets = scratch.take<float>(held * p.stride + 16);
  if (s.tokens == 1) {
    // Every thread prepares the one token for itself: waiting for another thread would take longer.
    Token own = take_token(scratch, s, p);
    // A thread may lose its core, and all would wait for it: the last tenth of the rows goes to free threads. In fours,
    // as with one thread: sums of four rows are added up in another order than those of one.
    int64_t fixed = threads > 1 ? s.out * 9 / 40 * 4 : s.out, unit = ceil_div(65536, p.row_bytes * run) * run;
    int64_t from = first_row(fixed, thread, threads), to = first_row(fixed, thread + 1, threads);
    fetch<V>(reinterpret_cast<const uint8_t*>(s.codes) + from * p.row_bytes, ahead(p, R));
    fetch_rows<V>(s, from, run);
    if (s.rank) fetch<V>(s.down, s.rank * s.in * (s.down_type == Type::i8 ? 1 : 2));
    prepare_decode<V, BITS, INT8>(s, p, 0, own, raw, x, rounded);
    auto work = [&](int64_t row, int64_t stop) {
      for (; row < stop; row += run) {
        int64_t end = least(stop, row + run);
        expand_scales<V, BITS>(s, p, row, end - row, scales, shifts);
        fetch_rows<V>(s, end, run);
        decode_range<V, BITS, INT8, R, 1>(s, p, &own, 0, 1, row, end, scales, shifts, weights, offsets);
      }
    };
    work(from, to);
    while ((from = fixed + __atomic_fetch_add(next, unit, __ATOMIC_RELAXED)) < s.out)
      work(from, least(s.out, from + unit));
    return;
  }
  for (int64_t t = thread; t < s.tokens; t += threads)
    prepare_decode<V, BITS, INT8>(s, p, t, shared[t], raw, x, rounded);
#ifdef _OPENMP
#pragma omp barrier
#endif
  int64_t to = first_row(s.out, thread + 1, threads);
  for (int64_t from = first_row(s.out, thread, threads); from < to; from += run) {
    int64_t end = least(to, from + run);
    expand_scales<V, BITS>(s, p, from, end - from, scales, shifts);
    fetch_rows<V>(s, end, run);
    for (int64_t t = 0; t < s.tokens; t += 4) {
      int count = static_cast<int>(least(4, s.tokens - t));
      Token four[4];
      for (int i = 0; i < 4; ++i) four[i] = shared[t + (i < count ? i : 0)];
      constexpr int S = V::shared_rows;
      if (count > 2)
        decode_range<V, BITS, INT8, S, 4>(s, p, four, t, count, from, end, scales, shifts, weights, offsets);
      else
        for (int i = 0; i < count; ++i)
          decode_range<V, BITS, INT8, R, 1>(s, p, four + i, t + i, 1, from, end, scales, shifts, weights, offsets);
    }
  }
}

}  // namespace
}  // namespace lopro
