// AVX-512 with byte products (VNNI): 16 lanes are one register.
#pragma once

#include <immintrin.h>

#include "common.h"

namespace lopro {
namespace {

struct Vector {
  using F = __m512;
  using I = __m512i;
  // Rows at a time for one token, and for four; registers of 16 rows, and tokens, of a tile for many.
  template <int BITS>
  static constexpr int rows = BITS < 4 ? 4 : 2;
  static constexpr int shared_rows = 2, panel = 2, tile = 8;
  // Registers of 16 rows that a column of states is read for at once: for one token, and for four.
  static constexpr int runs = 16, shared_runs = 4;

  static __mmask16 first(int n) { return static_cast<__mmask16>(n >= 16 ? 0xffff : (1u << n) - 1); }

  static F zero() { return _mm512_setzero_ps(); }
  static F set(float v) { return _mm512_set1_ps(v); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static void store_n(float* p, F v, int n) { _mm512_mask_storeu_ps(p, first(n), v); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
  static F fms(F a, F b, F c) { return _mm512_fmsub_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F abs(F a) { return _mm512_abs_ps(a); }
  static float reduce(F a) { return _mm512_reduce_add_ps(a); }
  // The sums of four vectors.
  static void reduce4(F a, F b, F c, F d, float* out) {
    F ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    F cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    F all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
  }
  static float reduce_max(F a) { return _mm512_reduce_max_ps(a); }
  static F permute(F a, I index) { return _mm512_permutexvar_ps(index, a); }
  static F flip(F a, uint32_t bits) {
    return _mm512_castsi512_ps(_mm512_mask_xor_epi32(_mm512_castps_si512(a), static_cast<__mmask16>(bits),
                                                     _mm512_castps_si512(a), _mm512_set1_epi32(INT32_MIN)));
  }
  // Sums in lanes without bit N of their number, differences in lanes with it.
  template <int N>
  static F butterfly(F a) {
    constexpr int swap = N == 1 || N == 4 ? 0xb1 : 0x4e;
    F other = N < 4 ? _mm512_permute_ps(a, swap) : _mm512_shuffle_f32x4(a, a, swap);
    constexpr __mmask16 high = N == 1 ? 0xaaaa : N == 2 ? 0xcccc : N == 4 ? 0xf0f0 : 0xff00;
    return _mm512_mask_sub_ps(_mm512_add_ps(a, other), high, other, a);
  }
  static F load_f16(const uint16_t* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)); }
  static F load_bf16(const uint16_t* p, int n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), p)), 16));
  }
  static F load_i8(const int8_t* p, int n) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(n), p)));
  }
  // Rounds to the nearest even int8, stores, and returns what it stored.
  static F round_i8(F a, int8_t* p) {
    I rounded = _mm512_cvtps_epi32(a);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(rounded));
    return _mm512_cvtepi32_ps(rounded);
  }

  static I zero_i() { return _mm512_setzero_si512(); }
  static I set_i(int v) { return _mm512_set1_epi32(v); }
  static I iota() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
  static I load_i(const void* p) { return _mm512_loadu_si512(p); }
  static I load_bytes(const void* p, int n) { return _mm512_maskz_loadu_epi8(n >= 64 ? ~0ull : (1ull << n) - 1, p); }
  // Keeps a load in its register: otherwise the compiler would load again for each field.
  static void keep(I& v) { asm("" : "+v"(v)); }
  static void store_i(void* p, I v) { _mm512_storeu_si512(p, v); }
  static I add_i(I a, I b) { return _mm512_add_epi32(a, b); }
  static I mask(I a, int bits) { return _mm512_and_si512(a, _mm512_set1_epi32(bits)); }
  // The two low bits of each byte of `low`, the third of `high`.
  static I join(I low, I high) {
    I bits = _mm512_ternarylogic_epi32(low, high, _mm512_set1_epi32(0x03030303), 0xe4);
    return _mm512_and_si512(bits, _mm512_set1_epi32(0x07070707));
  }
  template <int N>
  static I shr(I a) { return N ? _mm512_srli_epi32(a, N) : a; }
  template <int N>
  static I shl(I a) { return N ? _mm512_slli_epi32(a, N) : a; }
  template <int N>
  static I times(I a) { return _mm512_slli_epi32(a, N == 16 ? 4 : N == 8 ? 3 : N == 4 ? 2 : 1); }
  static I shr_by(I a, int n) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(n)); }
  static I shrv(I a, I n) { return _mm512_srlv_epi32(a, n); }
  static I permute_i(I a, I index) { return _mm512_permutexvar_epi32(index, a); }
  static F to_f(I a) { return _mm512_cvtepi32_ps(a); }
  template <int BITS>
  static I dot(I sum, I codes, I x) { return _mm512_dpbusd_epi32(sum, codes, x); }
  // Eight words of single bits, each for two lanes, its half of the bits lowest in each byte.
  static I load_high(const void* p, int n) {
    __m256i words = _mm256_maskz_loadu_epi8(n >= 32 ? ~0u : (1u << n) - 1, p);
    I pairs = _mm512_cvtepu32_epi64(words);
    return _mm512_or_si512(pairs, _mm512_slli_epi64(_mm512_srli_epi32(pairs, 4), 32));
  }
  // fp32 of the code in the lowest bits of each lane; bits above are ignored.
  template <int BITS>
  static F code(I a) {
    if (BITS == 8) return _mm512_cvtepi32_ps(mask(a, 255));
    F table = _mm512_cvtepi32_ps(mask(iota(), (1 << (BITS & 7)) - 1));
    return _mm512_permutexvar_ps(a, table);
  }
  // Into L2. The compiler would drop the intrinsic in a function that does nothing else.
  static void fetch(const void* p) { asm volatile("prefetcht1 %0" ::"m"(*static_cast<const char*>(p))); }
  // Bits from STEP * lane of p on, 16 of them at least; others above. Reads 8 bytes, or 16 for more than 3 bits a lane.
  template <int STEP>
  static I windows(const uint8_t* p) {
    I all;
    if (STEP <= 3) {
      int64_t bits;
      std::memcpy(&bits, p, 8);
      all = _mm512_set1_epi64(bits);
    } else {
      all = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    I own = _mm512_shuffle_epi8(all, load_i(steps_of<STEP>.bytes));
    return _mm512_srlv_epi32(own, load_i(steps_of<STEP>.shifts));
  }
  // As in avx2.h; here, shuffles cost less.
  template <int>
  static constexpr bool mixes = false;
  static I times_i(I a, int v) { return _mm512_mullo_epi32(a, _mm512_set1_epi32(v)); }
  // Sums of the bytes 0 and 3, and 1 and 2, of each lane as its halves; or of all four.
  template <int COLUMNS>
  static I sums(I a) {
    I ones = _mm512_set1_epi8(1);
    if (COLUMNS == 1) return _mm512_dpbusd_epi32(zero_i(), a, ones);
    I outer_inner = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 3, 1, 2, 4, 7, 5, 6, 8, 11, 9, 10, 12, 15, 13, 14));
    return _mm512_maddubs_epi16(_mm512_shuffle_epi8(a, outer_inner), ones);
  }
  // Products of the halves of lanes, signed.
  static I dot_halves(I sum, I a, I b) { return _mm512_dpwssd_epi32(sum, a, b); }
  // Keeps a sum in its register, and what follows behind it: interleaved blocks of rows would need too many.
  static void hold(I& v) { asm volatile("" : "+v"(v)); }
  // For one token, `factor` of a product of states and `spread` of the activations of its columns are multiplied by
  // `dot_factor`: bytes times int8.
  template <int COLUMNS>
  static I factor(I a) { return a; }
  template <int COLUMNS>
  static uint32_t spread(int a, int b) {
    uint32_t outer = static_cast<uint8_t>(a), inner = static_cast<uint8_t>(COLUMNS == 1 ? a : b);
    return outer * 0x01000001u | inner * 0x00010100u;
  }
  static I dot_factor(I sum, I factor, I x) { return _mm512_dpbusd_epi32(sum, factor, x); }
  static void transpose(I* v) {
    I a[16];
    for (int i = 0; i < 16; i += 2) {
      a[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
      a[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      v[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
      v[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
      v[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
      v[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
      a[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
      a[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
      a[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
      a[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
      v[i] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88);
      v[i + 8] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd);
      v[i + 4] = _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0x88);
      v[i + 12] = _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0xdd);
    }
  }
};

}  // namespace

}  // namespace lopro
