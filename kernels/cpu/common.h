// Numbers, memory and sizes that every part of the kernel uses.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "site.h"

namespace lopro {
namespace {

constexpr int64_t PAD = 256;          // columns that buffers are padded to: a multiple of every chunk and block
constexpr int64_t DECODE_TOKENS = 8;  // up to here, weights are used as they are read, without a panel
constexpr int64_t PANEL_COLUMNS = 512;

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

// `count` of them, without a choice of type for each.
inline void store_run(void* base, Type type, int64_t first, const float* values, int64_t count) {
  uint16_t* halves = static_cast<uint16_t*>(base) + first;
  if (type == Type::f32) std::memcpy(static_cast<float*>(base) + first, values, static_cast<size_t>(count) * 4);
  else if (type == Type::f16)
    for (int64_t i = 0; i < count; ++i) halves[i] = float_to_half(values[i]);
  else
    for (int64_t i = 0; i < count; ++i) halves[i] = float_to_bfloat(values[i]);
}

inline uint32_t load_word(const void* p) {
  uint32_t word;
  std::memcpy(&word, p, 4);
  return word;
}

// Prefetches these bytes.
template <class V>
void fetch(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) V::fetch(static_cast<const char*>(p) + i);
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

// Two int16 as the halves of a word.
inline uint32_t pair(int low, int high) {
  return static_cast<uint16_t>(low) | static_cast<uint32_t>(static_cast<uint16_t>(high)) << 16;
}

// Bytes that bring `STEP`-bit steps into lanes: byte i of a lane is byte STEP * lane / 8 + i.
template <int STEP>
struct Steps {
  alignas(64) char bytes[64];
  alignas(64) int shifts[16];  // what remains, in bits
  constexpr Steps() : bytes(), shifts() {
    for (int i = 0; i < 64; ++i) bytes[i] = static_cast<char>(STEP * (i / 4) / 8 + i % 4);
    for (int i = 0; i < 16; ++i) shifts[i] = STEP * i % 8;
  }
};
template <int STEP>
constexpr Steps<STEP> steps_of{};

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

// Sizes of an activation that follow from a site. Columns that share a step are a block, or several.
struct Sizes {
  int64_t columns;  // of buffers: in, padded
  int64_t block, blocks, padded_blocks;
  int log_block;
  int64_t shared;  // blocks that share a step
  float clip;
  int64_t lanes;    // of a latent, padded
};

// Part of the largest magnitude of `columns` that becomes the integer `largest`, see `clip_for` in
// activation/reference.py.
inline float clip_for(float largest, int64_t columns) {
  double clip = largest < 127.0f ? 1.2 - 0.05 * std::log2(static_cast<double>(columns)) : 1.0;
  return static_cast<float>(clip < 0.7 ? 0.7 : clip > 1.0 ? 1.0 : clip);
}

inline int log_block_for(const Site& s) {
  if (s.act_group > 0) return s.act_group == 32 ? 5 : s.act_group == 64 ? 6 : 7;
  return s.int8 && s.block == 1 && s.act_group == 0 ? 5 : 7;
}

inline Sizes make_sizes(const Site& s, int log_block) {
  Sizes p;
  p.columns = round_up(s.in, PAD);
  p.log_block = log_block;
  p.block = int64_t{1} << log_block;
  p.blocks = ceil_div(s.in, p.block);
  p.padded_blocks = round_up(p.columns / p.block, 16);
  p.shared = s.act_group == -1 ? p.columns / p.block : s.act_group > 0 ? s.act_group / p.block : 1;
  p.clip = clip_for(s.largest, s.act_group == -1 ? s.in : p.shared * p.block);
  p.lanes = round_up(s.rank, 16);
  return p;
}

// One activation, ready for the product.
struct Token {
  void* x;        // as the format arranges it: integers, or fp32
  float* steps;   // (padded_blocks,), of int8
  float* sums;    // (padded_blocks,) of x
  float* latent;  // (max(parts, 1), lanes), scaled
};

// Row of y of a site's token, and its token of x.
inline int64_t row_of(const Site& s, int64_t token) { return s.rows ? s.rows[token] : token; }
inline int64_t source_of(const Site& s, int64_t token) { return s.rows ? s.rows[token] / s.slots : token; }

inline int64_t part_of(const Site& s, int64_t row) { return s.parts > 1 ? row * s.parts / s.out : 0; }

}  // namespace
}  // namespace lopro
