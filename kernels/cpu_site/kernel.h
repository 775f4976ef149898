// The algorithm of every path, over 16 lanes of 32 bits that the path defines (struct V).
//
// Everything here has internal linkage: each file is compiled for another processor, and the linker must not take one
// file's copy of a function for another's.
//
// Weights are read as they are stored. 64 bytes of a row are one chunk: lane l holds `lane` codes in a row, byte p of
// the chunk holds codes p*fields ... p*fields + fields - 1, so that a shift and a mask give 64 codes as bytes. The
// activation is stored in the same order, field by field, and a chunk is `fields` products of bytes. Input columns are
// divided into blocks of 32, 64 or 128, which divide the groups of the weight: a lane belongs to one block, so scales
// are applied lane by lane, and lanes are added up once a row.
//
//   y = sum over blocks of s_w * (sum q * x - (zero + 1/2) * sum x),   x = step * int8 where activations are rounded
//
// For many tokens, 16 rows are transposed and unpacked into a panel, four codes of each row side by side, which 12
// tokens share while it is in the cache.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "site.h"
#ifdef _OPENMP
#include <omp.h>
#endif

namespace lopro {
namespace {

constexpr int64_t PAD = 256;          // columns that buffers are padded to: a multiple of every chunk and block
constexpr int64_t DECODE_TOKENS = 8;  // up to here, weights are read and used at once
constexpr int64_t PANEL_COLUMNS = 512;
constexpr int64_t AHEAD = 1024;  // bytes that memory is asked for in advance, at least

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline float half_to_float(uint16_t half) {
  uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff, bits;
  float value;
  if (rest >= 0x7c00) {
    bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  // 2^112 moves the exponent's bias from 15 to 127, and makes subnormals right too.
  bits = rest << 13;
  std::memcpy(&value, &bits, 4);
  value *= 5192296858534827628530496329220096.0f;
  return sign ? -value : value;
}

inline float bfloat_to_float(uint16_t value) {
  uint32_t bits = (uint32_t)value << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

inline uint16_t float_to_bfloat(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return 0x7fc0;
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline uint16_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  uint16_t sign = (uint16_t)((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;  // 65520 and above
  if (bits < 0x38800000) {                       // subnormal: the float's adder rounds at 2^-24
    float shifted, half = 0.5f;
    std::memcpy(&shifted, &bits, 4);
    shifted += half;
    uint32_t rounded, base;
    std::memcpy(&rounded, &shifted, 4);
    std::memcpy(&base, &half, 4);
    return sign | (uint16_t)(rounded - base);
  }
  return sign | (uint16_t)((bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13);
}

inline float load_scalar(const void* base, Type type, int64_t i) {
  switch (type) {
    case Type::f32: return static_cast<const float*>(base)[i];
    case Type::f16: return half_to_float(static_cast<const uint16_t*>(base)[i]);
    case Type::bf16: return bfloat_to_float(static_cast<const uint16_t*>(base)[i]);
    default: return static_cast<float>(static_cast<const int8_t*>(base)[i]);
  }
}

inline void store_scalar(void* base, Type type, int64_t i, float value) {
  if (type == Type::f32) static_cast<float*>(base)[i] = value;
  else static_cast<uint16_t*>(base)[i] = type == Type::f16 ? float_to_half(value) : float_to_bfloat(value);
}

inline uint32_t load_word(const void* p) {
  uint32_t word;
  std::memcpy(&word, p, 4);
  return word;
}

// f(0), ..., f(N - 1) with compile-time numbers: arrays that are only indexed by these stay in registers.
#define LOPRO_INLINE __attribute__((always_inline))
template <int... I, class Body>
LOPRO_INLINE inline void repeat(std::integer_sequence<int, I...>, Body&& body) {
  (body(std::integral_constant<int, I>{}), ...);
}
template <int N, class Body>
LOPRO_INLINE inline void repeat(Body&& body) {
  repeat(std::make_integer_sequence<int, N>{}, body);
}

// Scratch memory on a cache line.
struct Scratch {
  char* data;
  explicit Scratch(int64_t bytes) : raw(std::malloc(static_cast<size_t>(bytes) + 64)) {
    if (!raw) std::abort();
    data = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(raw) + 63) & ~static_cast<uintptr_t>(63));
  }
  ~Scratch() { std::free(raw); }
  Scratch(const Scratch&) = delete;
  template <class T>
  T* take(int64_t count) {
    T* result = reinterpret_cast<T*>(data);
    data += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return result;
  }

 private:
  void* raw;
};

template <int BITS>
struct Codes {
  static constexpr int width = BITS == 3 ? 2 : BITS;
  static constexpr int fields = 8 / width;
  static constexpr int lane = 4 * fields;
  static constexpr int chunk = 16 * lane;
};

// Sizes that follow from a site.
struct Plan {
  int64_t columns;            // of buffers: in, padded
  int64_t chunks;             // of a row; the last one may be short
  int64_t row_bytes, plane;   // of a row, and of its first bit plane
  int64_t block, blocks, padded_blocks;
  int log_block;
  bool by_group;              // scales of a row are kept by group of 2^log_ratio blocks, else by block
  int log_ratio;
  int64_t scales;             // kept, of a row
  int64_t lanes;              // of a latent, padded
};

inline Plan make_plan(const Site& s) {
  Plan p;
  int64_t padded = round_up(s.in, 32), width = s.bits == 3 ? 2 : s.bits;
  p.columns = round_up(s.in, PAD);
  p.row_bytes = padded / 8 * s.bits;
  p.plane = padded / 8 * width;
  p.chunks = ceil_div(p.plane, 64);
  p.log_block = s.int8 && s.block == 1 ? 5 : 7;
  while (s.groups > 1 && s.group % (int64_t{1} << p.log_block)) --p.log_block;
  p.block = int64_t{1} << p.log_block;
  p.blocks = ceil_div(s.in, p.block);
  p.log_ratio = 0;
  while (s.groups > 1 && p.block << p.log_ratio < s.group) ++p.log_ratio;
  p.by_group = s.groups > 1 && p.block << p.log_ratio == s.group;
  if (!p.by_group) p.log_ratio = 0;
  p.scales = p.by_group ? s.groups : p.blocks;
  p.padded_blocks = round_up(p.columns / p.block, 16);
  p.lanes = round_up(s.rank, 16);
  return p;
}

// One activation, ready for the product.
struct Token {
  void* x;        // int8 by chunk and field; or fp32, by chunk and code of a lane, or in order for panels
  float* steps;   // (padded_blocks,), of int8
  float* sums;    // (padded_blocks,) of x
  float* latent;  // (max(parts, 1), lanes), scaled
};

inline int64_t group_of(const Site& s, const Plan& p, int64_t block) {
  return s.groups == 1 ? 0 : (block << p.log_block) / s.group;
}

inline int64_t part_of(const Site& s, int64_t row) { return s.parts > 1 ? row * s.parts / s.out : 0; }

// ---- the activation: rotation, low-rank projection, rounding

template <class V>
void load_token(const Site& s, int64_t token, float* out) {
  int64_t offset = 0;
  for (int64_t d = s.dims - 1, rest = token; d >= 0; rest /= s.sizes[d], --d) offset += rest % s.sizes[d] * s.strides[d];
  if (s.column_stride != 1) {
    for (int64_t j = 0; j < s.in; ++j) out[j] = load_scalar(s.x, s.type, offset + j * s.column_stride);
  } else if (s.type == Type::f32) {
    std::memcpy(out, static_cast<const float*>(s.x) + offset, static_cast<size_t>(s.in) * 4);
  } else {
    const uint16_t* x = static_cast<const uint16_t*>(s.x) + offset;
    for (int64_t j = 0; j < s.in; j += 16) {
      int n = static_cast<int>(least(16, s.in - j));
      V::store_n(out + j, s.type == Type::f16 ? V::load_f16(x + j, n) : V::load_bf16(x + j, n), n);
    }
  }
}

// Normalised Hadamard transform of each `block` of x (n,); whole vectors are read and written.
template <class V>
void hadamard(float* x, int64_t n, int64_t block) {
  const typename V::F norm = V::set(1.0f / std::sqrt(static_cast<float>(block)));
  for (int64_t j = 0; j < n; j += 16) {
    typename V::F v = V::mul(V::load(x + j), norm);
    v = V::template butterfly<1>(v);
    if (block > 2) v = V::template butterfly<2>(v);
    if (block > 4) v = V::template butterfly<4>(v);
    if (block > 8) v = V::template butterfly<8>(v);
    V::store(x + j, v);
  }
  for (int64_t step = 16; step < block; step *= 2)
    for (int64_t start = 0; start < n; start += 2 * step)
      for (int64_t j = start; j < start + step; j += 16) {
        typename V::F a = V::load(x + j), b = V::load(x + j + step);
        V::store(x + j, V::add(a, b));
        V::store(x + j + step, V::sub(a, b));
      }
}

// x' in fp32, zeros up to `columns`.
template <class V>
void rotate(const Site& s, const Plan& p, int64_t token, float* raw, float* out) {
  load_token<V>(s, token, s.perm ? raw : out);
  if (s.perm_type == Type::i16) {
    const int16_t* perm = static_cast<const int16_t*>(s.perm);
    for (int64_t j = 0; j < s.in; ++j) out[j] = raw[perm[j]];
  } else if (s.perm_type == Type::i32) {
    const int32_t* perm = static_cast<const int32_t*>(s.perm);
    for (int64_t j = 0; j < s.in; ++j) out[j] = raw[perm[j]];
  }
  std::memset(out + s.in, 0, static_cast<size_t>(p.columns + 16 - s.in) * 4);
  if (s.block == 1) return;
  if (s.signs)
    for (int64_t j = s.skip & ~int64_t{15}; j < s.in; j += 16) {
      uint32_t bits = s.signs[j / 8] | (j + 8 < s.in ? s.signs[j / 8 + 1] << 8 : 0);
      if (j < s.skip) bits &= ~0u << (s.skip - j);
      V::store(out + j, V::flip(V::load(out + j), bits));
    }
  hadamard<V>(out + s.skip, s.in - s.skip, s.block);
  // A last vector that reaches past the columns holds zeros there, whose transform is zero.
}

// latents[t] = scales ∘ (down · x[t]), T tokens at once.
template <class V, int T>
void project(const Site& s, const Plan& p, const float* x, int64_t stride, Token* tokens) {
  using F = typename V::F;
  for (int64_t r = 0; r < s.rank; ++r) {
    F sum[T];
    for (int t = 0; t < T; ++t) sum[t] = V::zero();
    for (int64_t j = 0; j < s.in; j += 16) {
      int n = static_cast<int>(least(16, s.in - j));
      F a = s.down_type == Type::i8 ? V::load_i8(static_cast<const int8_t*>(s.down) + r * s.in + j, n)
                                    : V::load_f16(static_cast<const uint16_t*>(s.down) + r * s.in + j, n);
      for (int t = 0; t < T; ++t) sum[t] = V::fma(a, V::load(x + t * stride + j), sum[t]);
    }
    float scale = s.down_scale ? half_to_float(s.down_scale[r]) : 1.0f;
    for (int t = 0; t < T; ++t) {
      float latent = V::reduce(sum[t]) * scale;
      tokens[t].latent[r] = latent;
      for (int64_t part = 0; part < s.parts; ++part)
        tokens[t].latent[part * p.lanes + r] = latent * half_to_float(s.up_scale[part * s.rank + r]);
    }
  }
  for (int t = 0; t < T; ++t)
    for (int64_t part = 0; part < (s.parts > 1 ? s.parts : 1); ++part)
      for (int64_t r = s.rank; r < p.lanes; ++r) tokens[t].latent[part * p.lanes + r] = 0.0f;
}

// Steps and sums of the blocks of x, and with INT8 x as integers in the order of the columns.
template <class V, bool INT8>
void round_blocks(const Plan& p, const float* x, int8_t* rounded, Token& token) {
  using F = typename V::F;
  int64_t b = 0;
  for (; b < p.columns / p.block; ++b) {
    const float* part = x + b * p.block;
    F sum = V::zero();
    if (INT8) {
      F top = V::zero(), poison = V::zero();
      for (int64_t j = 0; j < p.block; j += 16) {
        F v = V::load(part + j);
        top = V::max(top, V::abs(v));
        poison = V::fma(v, V::zero(), poison);  // NaN where v is not finite
      }
      float most = V::reduce_max(top) + V::reduce(poison);
      // As in reference.py: nothing but zeros, and no subnormal step.
      float inverse = most > 1e-30f ? 127.0f / most : most != most ? most : 0.0f;
      float step = most > 1e-30f || most != most ? most * (1.0f / 127.0f) : 0.0f;
      F factor = V::set(inverse);
      for (int64_t j = 0; j < p.block; j += 16)
        sum = V::add(sum, V::round_i8(V::mul(V::load(part + j), factor), rounded + b * p.block + j));
      token.steps[b] = step;
      token.sums[b] = V::reduce(sum) * step;
    } else {
      for (int64_t j = 0; j < p.block; j += 16) sum = V::add(sum, V::load(part + j));
      token.sums[b] = V::reduce(sum);
    }
  }
  for (; b < p.padded_blocks; ++b) token.steps[b] = token.sums[b] = 0.0f;
}

// int8 columns, chunk by chunk, into the order of the bytes that a shift and a mask make of packed codes.
template <int FIELDS>
void interleave(const int8_t* in, int8_t* out, int64_t columns) {
  for (int64_t c = 0; c < columns; c += 64 * FIELDS)
    for (int f = 0; f < FIELDS; ++f)
      for (int b = 0; b < 64; ++b) out[c + f * 64 + b] = in[c + b * FIELDS + f];
}

// ---- few tokens: rows of packed codes times activations

// Codes c of a row: the plane of low bits and, of 3-bit codes, that of the high ones.
template <class V, int BITS>
inline void load_codes(const uint8_t* row, int64_t plane, int64_t c, bool whole, typename V::I& low,
                       typename V::I& high) {
  int n = static_cast<int>(least(64, plane - c * 64));
  low = whole ? V::load_i(row + c * 64) : V::load_bytes(row + c * 64, n);
  V::keep(low);
  if (BITS == 3) high = V::load_high(row + plane + c * 32, whole ? 32 : n / 2);
}

// 64 codes as bytes, field f of each byte of the plane.
template <class V, int BITS, int f>
inline typename V::I field(typename V::I low, typename V::I high) {
  using C = Codes<BITS>;
  if (BITS == 8) return low;
  typename V::I shifted = V::template shr<f * C::width>(low);
  if (BITS != 3) return V::mask(shifted, C::width == 2 ? 0x03030303 : 0x0f0f0f0f);
  typename V::I top = f < 2 ? V::template shl<(f < 2 ? 2 - f : 0)>(high) : V::template shr<(f < 2 ? 0 : f - 2)>(high);
  return V::join(shifted, top);
}

// Code j of each lane as fp32.
template <class V, int BITS, int j>
inline typename V::F single(typename V::I low, typename V::I high) {
  using C = Codes<BITS>;
  typename V::I shifted = V::template shr<j * C::width>(low);
  if (BITS == 3) {
    constexpr int at = 8 * (j / 4) + j % 4 - 2;  // how far the high bit is above its place
    shifted = V::join(shifted, at < 0 ? V::template shl<(at < 0 ? -at : 0)>(high)
                                      : V::template shr<(at < 0 ? 0 : at)>(high));
  }
  return V::template code<BITS>(shifted);
}

// Zero code `i` of the flat, packed tensor.
inline uint32_t zero_code(const Site& s, int64_t i) {
  int64_t width = s.bits == 3 ? 2 : s.bits;
  uint32_t code = (s.zeros[i * width / 32] >> (i * width % 32)) & ((1u << width) - 1);
  if (s.bits == 3) {
    const uint32_t* high = s.zeros + ceil_div(s.out * s.groups, 32) * 2;
    code |= ((high[i / 32] >> (8 * (i % 16 / 4) + 4 * (i % 32 / 16) + i % 4)) & 1) << 2;
  }
  return code;
}

// Zeros (code + 1/2) `first` ... `first` + 15 of the flat, packed tensor; any finite value behind the last.
template <class V, int BITS>
inline typename V::F flat_zeros(const Site& s, int64_t first) {
  using C = Codes<BITS>;
  using I = typename V::I;
  // The 16 codes lie in at most five words; each lane takes its word and shifts its code down.
  int64_t word = first * C::width / 32;
  I offset = V::add_i(V::template times<C::width>(V::iota()), V::set_i(static_cast<int>(first * C::width % 32)));
  I words = V::load_bytes(s.zeros + word, static_cast<int>(4 * least(16, s.zero_words - word)));
  I low = V::shrv(V::permute_i(words, V::template shr<5>(offset)), V::mask(offset, 31));
  if (BITS != 3) return V::add(V::to_f(V::mask(low, (1 << C::width) - 1)), V::set(0.5f));
  int64_t plane = ceil_div(s.out * s.groups, 32) * 2, high_word = plane + first / 32;
  I place = V::add_i(V::iota(), V::set_i(static_cast<int>(first % 32)));
  I in_word = V::add_i(V::add_i(V::template shl<1>(V::mask(place, 12)), V::template shr<2>(V::mask(place, 16))),
                       V::mask(place, 3));
  words = V::load_bytes(s.zeros + high_word, static_cast<int>(4 * least(16, s.zero_words - high_word)));
  I high = V::template shl<2>(V::shrv(V::permute_i(words, V::template shr<5>(place)), in_word));
  return V::add(V::to_f(V::mask(V::join(low, high), 7)), V::set(0.5f));
}

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

// Lanes whose sum is one row's product with T tokens; `order` is from `lane_blocks`.
template <class V, int BITS, bool INT8, int T>
LOPRO_INLINE inline void decode_row(const Site& s, const Plan& p, const Token* tokens, int64_t row, const float* scales,
                                    const float* shifts, const int32_t* order, typename V::F (&sum)[T]) {
  using C = Codes<BITS>;
  using F = typename V::F;
  using I = typename V::I;
  const uint8_t* codes = reinterpret_cast<const uint8_t*>(s.codes) + row * p.row_bytes;
  F even[T], odd[T];
  repeat<T>([&](auto t) LOPRO_INLINE { even[t] = odd[t] = V::zero(); });
  for (int64_t b = 0; b < p.blocks; b += 16) {
    // The next row's part, from its start to its end: the processor's own prefetcher stops at each page, and it loses the
    // two streams of 3 bits, which halves the bandwidth.
    int64_t part = (b << p.log_block) * BITS / 8, bytes = least(p.row_bytes - part, (int64_t{16} << p.log_block) * BITS / 8);
    const uint8_t* next = codes + (p.row_bytes > AHEAD ? p.row_bytes : AHEAD) + part;
    for (int64_t i = 0; i < bytes; i += 64) V::prefetch(next + i);
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
                 const float* scales, const float* shifts, const int32_t* order) {
  using F = typename V::F;
  F sum[R][T];
  // One row after the other: the processor's own prefetcher follows one stream best.
  for (int r = 0; r < R; ++r)
    decode_row<V, BITS, INT8, T>(s, p, tokens, row + r, scales + r * p.scales, shifts + r * p.scales, order, sum[r]);
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
                  int64_t end, const float* scales, const float* shifts, const int32_t* order) {
  for (; row + R <= end; row += R, scales += R * p.scales, shifts += R * p.scales)
    decode_rows<V, BITS, INT8, R, T>(s, p, tokens, token, count, row, scales, shifts, order);
  for (; row < end; ++row, scales += p.scales, shifts += p.scales)
    decode_rows<V, BITS, INT8, 1, T>(s, p, tokens, token, count, row, scales, shifts, order);
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
  int64_t from = s.out * thread / threads / 4 * 4, to = thread + 1 == threads ? s.out : s.out * (thread + 1) / threads / 4 * 4;
  // Rows in runs whose scales, and with several tokens codes, stay in the first cache.
  int64_t run = s.tokens > 1 ? 16 : least(128, 4 + 512 / p.scales / 4 * 4);
  Scratch scratch(p.columns * 12 + 1024 + token_bytes(s, p) + 2 * (run * p.scales + 32) * 4 + ORDERS * 64);
  float* raw = scratch.take<float>(p.columns + 16);
  float* x = scratch.take<float>(p.columns + 16);
  int8_t* rounded = scratch.take<int8_t>(p.columns);
  float* scales = scratch.take<float>(run * p.scales + 16);
  float* shifts = scratch.take<float>(run * p.scales + 16);
  int32_t* order = scratch.take<int32_t>(ORDERS * 16);
  lane_blocks<V, BITS>(p, order);
  if (s.tokens == 1) {
    // Every thread prepares the one token for itself: that is shorter than waiting for another to do it.
    Token own = take_token(scratch, s, p);
    prepare_decode<V, BITS, INT8>(s, p, 0, own, raw, x, rounded);
    for (; from < to; from += run) {
      int64_t end = least(to, from + run);
      expand_scales<V, BITS>(s, p, from, end - from, scales, shifts);
      decode_range<V, BITS, INT8, V::rows, 1>(s, p, &own, 0, 1, from, end, scales, shifts, order);
    }
    return;
  }
  for (int64_t t = thread; t < s.tokens; t += threads) prepare_decode<V, BITS, INT8>(s, p, t, shared[t], raw, x, rounded);
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
        decode_range<V, BITS, INT8, V::shared_rows, 4>(s, p, four, t, count, from, end, scales, shifts, order);
      else
        for (int i = 0; i < count; ++i)
          decode_range<V, BITS, INT8, V::rows, 1>(s, p, four + i, t + i, 1, from, end, scales, shifts, order);
    }
  }
}

// ---- many tokens: unpacked panels of rows times tiles of tokens

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
        float scale = half_to_float(s.scales[group]);
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
    Scratch scratch((p.columns + 16) * 4 * (T + 1) + p.columns * (T + 1) + T * 2 * p.padded_blocks * 4 + 64 * (4 * T + 4));
    for (int64_t tile = thread; tile < tiles; tile += threads)
      prepare_tile<V, BITS, INT8>(s, p, tile, all, reinterpret_cast<char*>(&scratch));
  }
#ifdef _OPENMP
#pragma omp barrier
#endif
  // Few panels for many threads: the tiles are divided too.
  int64_t cuts = panels >= 4 * threads ? 1 : least(tiles, ceil_div(4 * threads, panels));
  int64_t each = ceil_div(tiles, cuts), jobs = panels * cuts;
  Scratch scratch(each * T * P * 4 + PANEL_COLUMNS / 32 * P * 8 + s.rank * P * 4 + PANEL_COLUMNS * P * 4 + 512);
  for (int64_t job = jobs * thread / threads; job < jobs * (thread + 1) / threads; ++job) {
    int64_t from = job % cuts * each, to = least(tiles, from + each);
    if (from < to) prefill_panel<V, BITS, INT8>(s, p, all, job / cuts * P, from, to, scratch);
  }
}

// ---- one call

template <class V, int BITS, bool INT8>
void call(const Site& s) {
  Plan p = make_plan(s);
#ifdef _OPENMP
  // A thread for so many bytes of weights at least: to wake one takes a few microseconds.
  int64_t useful = ceil_div(s.out * p.row_bytes * least(s.tokens, 64), 16384);
  int wanted = static_cast<int>(least(omp_get_max_threads(), useful));
#endif
  if (s.tokens <= DECODE_TOKENS) {
    Scratch scratch(s.tokens > 1 ? s.tokens * token_bytes(s, p) : 64);
    Token tokens[DECODE_TOKENS];
    if (s.tokens > 1)
      for (int64_t t = 0; t < s.tokens; ++t) tokens[t] = take_token(scratch, s, p);
#ifdef _OPENMP
#pragma omp parallel num_threads(wanted)
    decode<V, BITS, INT8>(s, p, omp_get_thread_num(), omp_get_num_threads(), tokens);
#else
    decode<V, BITS, INT8>(s, p, 0, 1, tokens);
#endif
    return;
  }
  int64_t tiles = ceil_div(s.tokens, V::tile), latent = (s.parts > 1 ? s.parts : 1) * p.lanes;
  Tiles all;
  all.words = p.columns / (INT8 ? 4 : 1);
  Scratch scratch(tiles * V::tile * 4 * (all.words + 2 * p.padded_blocks + latent) + 512);
  all.x = scratch.take<uint32_t>(tiles * all.words * V::tile);
  all.steps = scratch.take<float>(tiles * p.padded_blocks * V::tile);
  all.sums = scratch.take<float>(tiles * p.padded_blocks * V::tile);
  all.latents = scratch.take<float>(tiles * V::tile * latent);
#ifdef _OPENMP
#pragma omp parallel num_threads(wanted)
  prefill<V, BITS, INT8>(s, p, omp_get_thread_num(), omp_get_num_threads(), all);
#else
  prefill<V, BITS, INT8>(s, p, 0, 1, all);
#endif
}

template <class V>
void run_with(const Site& s) {
  switch (s.bits) {
    case 2: return s.int8 ? call<V, 2, true>(s) : call<V, 2, false>(s);
    case 3: return s.int8 ? call<V, 3, true>(s) : call<V, 3, false>(s);
    case 4: return s.int8 ? call<V, 4, true>(s) : call<V, 4, false>(s);
    default: return s.int8 ? call<V, 8, true>(s) : call<V, 8, false>(s);
  }
}

}  // namespace
}  // namespace lopro
