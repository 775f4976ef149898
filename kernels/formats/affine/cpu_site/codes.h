// Packed codes and zeros as vectors.
#pragma once

#include "plan.h"

namespace lopro {
namespace {

// Chunk c of a row: the plane of low bits and, for 3-bit codes, that of the high bits.
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

// Reorders int8 columns, chunk by chunk, like the bytes that a shift and a mask make of packed codes.
template <int FIELDS>
void interleave(const int8_t* in, int8_t* out, int64_t columns) {
  for (int64_t c = 0; c < columns; c += 64 * FIELDS)
    for (int f = 0; f < FIELDS; ++f)
      for (int b = 0; b < 64; ++b) out[c + f * 64 + b] = in[c + b * FIELDS + f];
}

// Zero code `i` of the flat, packed tensor.
inline uint32_t zero_code(const AffineSite& s, int64_t i) {
  int64_t width = s.bits == 3 ? 2 : s.bits;
  uint32_t code = (s.zeros[i * width / 32] >> (i * width % 32)) & ((1u << width) - 1);
  if (s.bits == 3) {
    const uint32_t* high = s.zeros + ceil_div(s.out * s.groups, 32) * 2;
    code |= ((high[i / 32] >> (8 * (i % 16 / 4) + 4 * (i % 32 / 16) + i % 4)) & 1) << 2;
  }
  return code;
}

// Zeros (code + 1/2) of the flat, packed tensor, 16 at a time.
template <class V, int BITS>
struct FlatZeros {
  using C = Codes<BITS>;
  using F = typename V::F;
  using I = typename V::I;
  const AffineSite& s;
  I word, shift;  // of the low bits of each of 16 codes: steps of 16 codes don't change them

  FlatZeros(const AffineSite& s, int64_t first) : s(s) {
    I bit = V::add_i(V::template times<C::width>(V::iota()), V::set_i(static_cast<int>(first * C::width % 32)));
    word = V::template shr<5>(bit);
    shift = V::mask(bit, 31);
  }

  // 16 words, of which at most five are used.
  I words(int64_t at) const {
    if (at + 16 <= s.zero_words) return V::load_i(s.zeros + at);
    return V::load_bytes(s.zeros + at, static_cast<int>(4 * (s.zero_words - at)));
  }

  // Zeros `first` ... `first` + 15; any finite value after the last.
  F operator()(int64_t first) const {
    I low = V::shrv(V::permute_i(words(first * C::width / 32), word), shift);
    if (BITS != 3) return V::add(V::to_f(V::mask(low, (1 << C::width) - 1)), V::set(0.5f));
    int64_t plane = ceil_div(s.out * s.groups, 32) * 2;
    I place = V::add_i(V::iota(), V::set_i(static_cast<int>(first % 32)));
    I in_word = V::add_i(V::add_i(V::template shl<1>(V::mask(place, 12)), V::template shr<2>(V::mask(place, 16))),
                         V::mask(place, 3));
    I high = V::shrv(V::permute_i(words(plane + first / 32), V::template shr<5>(place)), in_word);
    return V::add(V::to_f(V::mask(V::join(low, V::template shl<2>(high)), 7)), V::set(0.5f));
  }
};

}  // namespace
}  // namespace lopro
