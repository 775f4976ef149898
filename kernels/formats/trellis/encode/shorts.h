// Vectors of SHORTS 16-bit integers, as wide as the path's registers, with arithmetic that stops at the ends of its range.
//
//   add, subtract, product (a b / 2^16), rounded_product (a b / 2^15, to nearest)     signed
//   add_costs, subtract_costs, costs_product (a b / 2^16), least_of                   unsigned
#pragma once

#include <cstdint>

#if defined(__AVX512BW__) || defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "cpu/lanes.h"

#define SHORTS (2 * LANES)

namespace lopro {
namespace {

typedef int16_t Shorts __attribute__((vector_size(SHORTS * 2)));
typedef uint16_t Costs __attribute__((vector_size(SHORTS * 2)));

#if defined(__AVX512BW__)
#define LOPRO_SHORTS(name, instruction) \
  inline Shorts name(Shorts a, Shorts b) { return (Shorts)_mm512_##instruction((__m512i)a, (__m512i)b); }
#elif defined(__AVX2__)
#define LOPRO_SHORTS(name, instruction) \
  inline Shorts name(Shorts a, Shorts b) { return (Shorts)_mm256_##instruction((__m256i)a, (__m256i)b); }
#elif defined(__SSE2__)
#define LOPRO_SHORTS(name, instruction) \
  inline Shorts name(Shorts a, Shorts b) { return (Shorts)_mm_##instruction((__m128i)a, (__m128i)b); }
#endif

#if defined(LOPRO_SHORTS)
LOPRO_SHORTS(add, adds_epi16)
LOPRO_SHORTS(subtract, subs_epi16)
LOPRO_SHORTS(product, mulhi_epi16)
LOPRO_SHORTS(add_costs, adds_epu16)
LOPRO_SHORTS(subtract_costs, subs_epu16)
LOPRO_SHORTS(costs_product, mulhi_epu16)
#if defined(__AVX2__)
LOPRO_SHORTS(rounded_product, mulhrs_epi16)
LOPRO_SHORTS(least_of, min_epu16)
#else
LOPRO_SHORTS(lower_product, mullo_epi16)
inline Shorts rounded_product(Shorts a, Shorts b) {
  const Costs upper = (Costs)product(a, b), lower = (Costs)lower_product(a, b);
  return (Shorts)((upper << 1) + (lower >> 15) + (lower >> 14 & 1));
}
inline Shorts least_of(Shorts a, Shorts b) { return (Shorts)((Costs)a - (Costs)subtract_costs(a, b)); }
#endif
#elif defined(__ARM_NEON)
#define LOPRO_SIGNED(name, call) \
  inline Shorts name(Shorts a, Shorts b) { return (Shorts)call((int16x8_t)a, (int16x8_t)b); }
#define LOPRO_UNSIGNED(name, call) \
  inline Shorts name(Shorts a, Shorts b) { return (Shorts)call((uint16x8_t)a, (uint16x8_t)b); }
LOPRO_SIGNED(add, vqaddq_s16)
LOPRO_SIGNED(subtract, vqsubq_s16)
LOPRO_SIGNED(rounded_product, vqrdmulhq_s16)
LOPRO_UNSIGNED(add_costs, vqaddq_u16)
LOPRO_UNSIGNED(subtract_costs, vqsubq_u16)
LOPRO_UNSIGNED(least_of, vminq_u16)
inline Shorts product(Shorts a, Shorts b) {
  const int16x8_t x = (int16x8_t)a, y = (int16x8_t)b;
  return (Shorts)vshrn_high_n_s32(vshrn_n_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), 16), vmull_high_s16(x, y), 16);
}
inline Shorts costs_product(Shorts a, Shorts b) {
  const uint16x8_t x = (uint16x8_t)a, y = (uint16x8_t)b;
  return (Shorts)vshrn_high_n_u32(vshrn_n_u32(vmull_u16(vget_low_u16(x), vget_low_u16(y)), 16), vmull_high_u16(x, y), 16);
}
#else
template <class F>
inline Shorts each(Shorts a, Shorts b, F f) {
  for (int i = 0; i < SHORTS; ++i) a[i] = static_cast<int16_t>(f(a[i], b[i]));
  return a;
}
inline int32_t within(int32_t value, int32_t low, int32_t high) { return value < low ? low : value > high ? high : value; }
inline Shorts add(Shorts a, Shorts b) { return each(a, b, [](int32_t x, int32_t y) { return within(x + y, -32768, 32767); }); }
inline Shorts subtract(Shorts a, Shorts b) { return each(a, b, [](int32_t x, int32_t y) { return within(x - y, -32768, 32767); }); }
inline Shorts product(Shorts a, Shorts b) { return each(a, b, [](int32_t x, int32_t y) { return x * y >> 16; }); }
inline Shorts rounded_product(Shorts a, Shorts b) { return each(a, b, [](int32_t x, int32_t y) { return (x * y + 0x4000) >> 15; }); }
inline Shorts add_costs(Shorts a, Shorts b) { return each(a, b, [](uint16_t x, uint16_t y) { return within(x + y, 0, 65535); }); }
inline Shorts subtract_costs(Shorts a, Shorts b) { return each(a, b, [](uint16_t x, uint16_t y) { return within(x - y, 0, 65535); }); }
inline Shorts costs_product(Shorts a, Shorts b) { return each(a, b, [](uint16_t x, uint16_t y) { return uint32_t{x} * y >> 16; }); }
inline Shorts least_of(Shorts a, Shorts b) { return each(a, b, [](uint16_t x, uint16_t y) { return x < y ? x : y; }); }
#endif

inline Shorts all(int32_t value) { return Shorts{} + static_cast<int16_t>(value); }

}  // namespace
}  // namespace lopro
