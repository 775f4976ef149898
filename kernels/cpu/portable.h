// Plain C++ for every other processor: loops over 16 lanes, for the compiler to vectorise.
#pragma once

#include "common.h"

namespace lopro {
namespace {

struct Vector {
  struct F {
    float v[16];
  };
  struct I {
    uint32_t v[16];
  };
  template <int>
  static constexpr int rows = 1;
  static constexpr int shared_rows = 1, panel = 1, tile = 4;
  // Registers of 16 rows that a column of states is read for at once: for one token, and for four.
  static constexpr int runs = 1, shared_runs = 1;

  template <class Op>
  static F make(Op op) {
    F r;
    for (int i = 0; i < 16; ++i) r.v[i] = op(i);
    return r;
  }
  template <class Op>
  static I make_i(Op op) {
    I r;
    for (int i = 0; i < 16; ++i) r.v[i] = op(i);
    return r;
  }

  static F zero() { return set(0.0f); }
  static F set(float x) {
    return make([=](int) { return x; });
  }
  static F load(const float* p) {
    F r;
    std::memcpy(r.v, p, 64);
    return r;
  }
  static void store(float* p, F x) { std::memcpy(p, x.v, 64); }
  static F load_n(const float* p, int n) {
    F x = {};
    std::memcpy(x.v, p, static_cast<size_t>(n) * 4);
    return x;
  }
  static void store_n(float* p, F x, int n) { std::memcpy(p, x.v, static_cast<size_t>(n) * 4); }
  static F add(const F& x, const F& y) {
    return make([&](int i) { return x.v[i] + y.v[i]; });
  }
  static F sub(const F& x, const F& y) {
    return make([&](int i) { return x.v[i] - y.v[i]; });
  }
  static F mul(const F& x, const F& y) {
    return make([&](int i) { return x.v[i] * y.v[i]; });
  }
  static F fma(const F& x, const F& y, const F& z) {
    return make([&](int i) { return x.v[i] * y.v[i] + z.v[i]; });
  }
  static F fnma(const F& x, const F& y, const F& z) {
    return make([&](int i) { return z.v[i] - x.v[i] * y.v[i]; });
  }
  static F fms(const F& x, const F& y, const F& z) {
    return make([&](int i) { return x.v[i] * y.v[i] - z.v[i]; });
  }
  static F max(const F& x, const F& y) {
    return make([&](int i) { return x.v[i] > y.v[i] ? x.v[i] : y.v[i]; });
  }
  static F min(const F& x, const F& y) {
    return make([&](int i) { return x.v[i] < y.v[i] ? x.v[i] : y.v[i]; });
  }
  static F abs(const F& x) {
    return make([&](int i) { return std::fabs(x.v[i]); });
  }
  static float reduce(F x) {
    for (int n = 8; n; n /= 2)
      for (int i = 0; i < n; ++i) x.v[i] += x.v[i + n];
    return x.v[0];
  }
  static float reduce_max(F x) {
    for (int n = 8; n; n /= 2)
      for (int i = 0; i < n; ++i) x.v[i] = x.v[i] > x.v[i + n] ? x.v[i] : x.v[i + n];
    return x.v[0];
  }
  static F permute(const F& x, const I& index) {
    return make([&](int i) { return x.v[index.v[i] & 15]; });
  }
  static F flip(const F& x, uint32_t bits) {
    return make([&](int i) { return bits >> i & 1 ? -x.v[i] : x.v[i]; });
  }
  template <int N>
  static F butterfly(const F& x) {
    return make([&](int i) { return i & N ? x.v[i ^ N] - x.v[i] : x.v[i] + x.v[i ^ N]; });
  }
  static F load_f16(const uint16_t* p, int n) {
    return make([=](int i) { return i < n ? half_to_float(p[i]) : 0.0f; });
  }
  static F load_bf16(const uint16_t* p, int n) {
    return make([=](int i) { return i < n ? bfloat_to_float(p[i]) : 0.0f; });
  }
  static F load_i8(const int8_t* p, int n) {
    return make([=](int i) { return i < n ? static_cast<float>(p[i]) : 0.0f; });
  }
  static F round_i8(const F& x, int8_t* p) {
    // The processor's own rounding, to the nearest even; casting a NaN would be undefined.
    F r = make([&](int i) { return x.v[i] >= -127.5f && x.v[i] <= 127.5f ? std::nearbyint(x.v[i]) : 0.0f; });
    for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(r.v[i]);
    return r;
  }

  static I zero_i() { return set_i(0); }
  static I set_i(int x) {
    return make_i([=](int) { return static_cast<uint32_t>(x); });
  }
  static I iota() {
    return make_i([](int i) { return static_cast<uint32_t>(i); });
  }
  static I load_i(const void* p) {
    I r;
    std::memcpy(r.v, p, 64);
    return r;
  }
  static I load_bytes(const void* p, int n) {
    I r = zero_i();
    std::memcpy(r.v, p, static_cast<size_t>(least(n, 64)));
    return r;
  }
  static void keep(I&) {}
  static void store_i(void* p, const I& x) { std::memcpy(p, x.v, 64); }
  static I add_i(const I& x, const I& y) {
    return make_i([&](int i) { return x.v[i] + y.v[i]; });
  }
  static I mask(const I& x, int bits) {
    return make_i([&](int i) { return x.v[i] & static_cast<uint32_t>(bits); });
  }
  // The two low bits of each byte of `low`, the third of `high`.
  static I join(const I& low, const I& high) {
    return make_i([&](int i) { return (low.v[i] & 0x03030303u) | (high.v[i] & 0x04040404u); });
  }
  template <int N>
  static I shr(const I& x) {
    return shr_by(x, N);
  }
  template <int N>
  static I shl(const I& x) {
    return make_i([&](int i) { return x.v[i] << N; });
  }
  template <int N>
  static I times(const I& x) {
    return make_i([&](int i) { return x.v[i] * N; });
  }
  static I shr_by(const I& x, int n) {
    return make_i([&](int i) { return x.v[i] >> n; });
  }
  static I shrv(const I& x, const I& n) {
    return make_i([&](int i) { return x.v[i] >> n.v[i]; });
  }
  static I permute_i(const I& x, const I& index) {
    return make_i([&](int i) { return x.v[index.v[i] & 15]; });
  }
  static F to_f(const I& x) {
    return make([&](int i) { return static_cast<float>(static_cast<int32_t>(x.v[i])); });
  }
  template <int BITS>
  static I dot(const I& sum, const I& codes, const I& x) {
    I r = sum;
    for (int b = 0; b < 32; b += 8)
      for (int i = 0; i < 16; ++i) {
        // Both factors fit 16 bits, which narrow processors multiply fastest.
        int16_t code = static_cast<int16_t>(codes.v[i] >> b & 255), value = static_cast<int8_t>(x.v[i] >> b);
        r.v[i] += static_cast<uint32_t>(code * value);
      }
    return r;
  }
  // Eight words of single bits, each for two lanes, its half of the bits lowest in each byte.
  static I load_high(const void* p, int n) {
    uint32_t words[8] = {};
    std::memcpy(words, p, static_cast<size_t>(n));
    return make_i([&](int i) { return words[i / 2] >> (i % 2 * 4); });
  }
  // fp32 of the code in the lowest bits of each lane; bits above are ignored.
  template <int BITS>
  static F code(const I& x) {
    return to_f(mask(x, (1 << BITS) - 1));
  }
  // Bits from STEP * lane of p on, 16 of them at least; others above. Reads 4 bytes for each lane.
  template <int STEP>
  static I windows(const uint8_t* p) {
    return make_i([=](int i) { return load_word(p + STEP * i / 8) >> (STEP * i % 8); });
  }
  // As in avx2.h.
  template <int>
  static constexpr bool mixes = false;
  static I times_i(const I& x, int v) {
    return make_i([=](int i) { return x.v[i] * static_cast<uint32_t>(v); });
  }
  // Sums of the bytes 0 and 3, and 1 and 2, of each lane as its halves; or of all four.
  template <int COLUMNS>
  static I sums(const I& x) {
    if (COLUMNS == 1)
      return make_i([&](int i) {
        uint32_t pairs = (x.v[i] & 0xff00ffu) + (x.v[i] >> 8 & 0xff00ffu);
        return (pairs + (pairs >> 16)) & 0xffff;
      });
    return make_i([&](int i) {
      uint32_t outer = (x.v[i] & 255) + (x.v[i] >> 24), inner = (x.v[i] >> 8 & 255) + (x.v[i] >> 16 & 255);
      return outer | inner << 16;
    });
  }
  // Products of the halves of lanes, signed.
  static I dot_halves(const I& sum, const I& x, const I& y) {
    I r = sum;
    for (int b = 0; b < 32; b += 16)
      for (int i = 0; i < 16; ++i) {
        int16_t one = static_cast<int16_t>(x.v[i] >> b), other = static_cast<int16_t>(y.v[i] >> b);
        r.v[i] += static_cast<uint32_t>(one * other);
      }
    return r;
  }
  static void hold(I&) {}
  // For one token, `factor` of a product of states and `spread` of the activations of its columns are multiplied by
  // `dot_factor`: the sum of all bytes fits 16 bits, so a half of the lane is left empty.
  template <int COLUMNS>
  static I factor(const I& x) { return sums<COLUMNS>(x); }
  template <int COLUMNS>
  static uint32_t spread(int a, int b) { return pair(a, COLUMNS == 1 ? 0 : b); }
  static I dot_factor(const I& sum, const I& factor, const I& x) { return dot_halves(sum, factor, x); }
  static void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }
  static void transpose(I* v) {
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < i; ++j) {
        uint32_t other = v[i].v[j];
        v[i].v[j] = v[j].v[i];
        v[j].v[i] = other;
      }
  }
};

}  // namespace

}  // namespace lopro
