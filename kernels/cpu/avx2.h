// AVX2: 16 lanes are two registers.
#pragma once

#include <immintrin.h>

#include "common.h"

namespace lopro {
namespace {

struct Vector {
  struct F {
    __m256 a, b;
  };
  struct I {
    __m256i a, b;
  };
  template <int>
  static constexpr int rows = 2;
  static constexpr int shared_rows = 1, panel = 1, tile = 4;
  // Registers of 16 rows that a column of states is read for at once: for one token, and for four.
  static constexpr int runs = 4, shared_runs = 1;

  static F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static F set(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
  static F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static F load_n(const float* p, int n) {
    if (n == 16) return load(p);
    float all[16] = {};
    std::memcpy(all, p, static_cast<size_t>(n) * 4);
    return load(all);
  }
  static void store(float* p, F v) {
    _mm256_storeu_ps(p, v.a);
    _mm256_storeu_ps(p + 8, v.b);
  }
  static void store_n(float* p, F v, int n) {
    float all[16];
    store(all, v);
    std::memcpy(p, all, static_cast<size_t>(n) * 4);
  }
  static F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  static F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
  static F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
  static F fnma(F x, F y, F z) { return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)}; }
  static F fms(F x, F y, F z) { return {_mm256_fmsub_ps(x.a, y.a, z.a), _mm256_fmsub_ps(x.b, y.b, z.b)}; }
  static F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
  static F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
  static F abs(F x) {
    __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
  }
  static float reduce(F x) {
    __m256 half = _mm256_add_ps(x.a, x.b);
    __m128 v = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)));
  }
  static float reduce_max(F x) {
    __m256 half = _mm256_max_ps(x.a, x.b);
    __m128 v = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    v = _mm_max_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)));
  }
  static __m256 pick(F x, __m256i index) {
    __m256 high = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(x.a, index), _mm256_permutevar8x32_ps(x.b, index), high);
  }
  static F permute(F x, I index) { return {pick(x, index.a), pick(x, index.b)}; }
  static F flip(F x, uint32_t bits) {
    __m256i all = _mm256_set1_epi32(static_cast<int>(bits));
    __m256i places = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
    __m256i sign = _mm256_set1_epi32(INT32_MIN);
    __m256i a = _mm256_and_si256(_mm256_sllv_epi32(all, places), sign);
    __m256i b = _mm256_and_si256(_mm256_sllv_epi32(_mm256_srli_epi32(all, 8), places), sign);
    return {_mm256_xor_ps(x.a, _mm256_castsi256_ps(a)), _mm256_xor_ps(x.b, _mm256_castsi256_ps(b))};
  }
  template <int N>
  static __m256 cross(__m256 v) {
    __m256 other = N == 1 ? _mm256_permute_ps(v, 0xb1) : N == 2 ? _mm256_permute_ps(v, 0x4e)
                                                               : _mm256_permute2f128_ps(v, v, 1);
    constexpr int high = N == 1 ? 0xaa : N == 2 ? 0xcc : 0xf0;
    return _mm256_blend_ps(_mm256_add_ps(v, other), _mm256_sub_ps(other, v), high);
  }
  template <int N>
  static F butterfly(F x) {
    if (N == 8) return {_mm256_add_ps(x.a, x.b), _mm256_sub_ps(x.a, x.b)};
    return {cross<(N & 7)>(x.a), cross<(N & 7)>(x.b)};
  }
  // n elements at p, followed by zeros.
  template <class T>
  struct Part {
    T data[16] = {};
    const T* p;
    Part(const T* from, int n) : p(from) {
      if (n >= 16) return;
      std::memcpy(data, from, static_cast<size_t>(n) * sizeof(T));
      p = data;
    }
  };
  static __m128i half(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static F load_f16(const uint16_t* from, int n) {
    Part<uint16_t> part(from, n);
    return {_mm256_cvtph_ps(half(part.p)), _mm256_cvtph_ps(half(part.p + 8))};
  }
  static F load_bf16(const uint16_t* from, int n) {
    Part<uint16_t> part(from, n);
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half(part.p)), 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half(part.p + 8)), 16))};
  }
  static F load_i8(const int8_t* from, int n) {
    Part<int8_t> part(from, n);
    __m128i bytes = half(part.p);
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
  }
  static F round_i8(F x, int8_t* p) {
    __m256i a = _mm256_cvtps_epi32(x.a), b = _mm256_cvtps_epi32(x.b);
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
    __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
    return {_mm256_cvtepi32_ps(a), _mm256_cvtepi32_ps(b)};
  }

  static I zero_i() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static I set_i(int v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
  static I iota() {
    return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)};
  }
  static I load_i(const void* p) {
    const __m256i* v = static_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(v), _mm256_loadu_si256(v + 1)};
  }
  static I load_bytes(const void* p, int n) {
    if (n >= 64) return load_i(p);
    char all[64] = {};
    std::memcpy(all, p, static_cast<size_t>(n));
    return load_i(all);
  }
  static void keep(I&) {}
  static void store_i(void* p, I v) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), v.a);
    _mm256_storeu_si256(static_cast<__m256i*>(p) + 1, v.b);
  }
  static I add_i(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
  static I mask(I x, int bits) {
    __m256i m = _mm256_set1_epi32(bits);
    return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)};
  }
  static __m256i join(__m256i low, __m256i high) {
    return _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi32(0x03030303)),
                           _mm256_and_si256(high, _mm256_set1_epi32(0x04040404)));
  }
  // The two low bits of each byte of `low`, the third of `high`.
  static I join(I low, I high) { return {join(low.a, high.a), join(low.b, high.b)}; }
  template <int N>
  static I shr(I x) { return {_mm256_srli_epi32(x.a, N), _mm256_srli_epi32(x.b, N)}; }
  template <int N>
  static I shl(I x) { return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)}; }
  template <int N>
  static I times(I x) { return shl<(N == 16 ? 4 : N == 8 ? 3 : N == 4 ? 2 : 1)>(x); }
  static I shr_by(I x, int n) {
    __m128i count = _mm_cvtsi32_si128(n);
    return {_mm256_srl_epi32(x.a, count), _mm256_srl_epi32(x.b, count)};
  }
  static I shrv(I x, I n) { return {_mm256_srlv_epi32(x.a, n.a), _mm256_srlv_epi32(x.b, n.b)}; }
  static I permute_i(I x, I index) {
    F r = permute(F{_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}, index);
    return {_mm256_castps_si256(r.a), _mm256_castps_si256(r.b)};
  }
  static F to_f(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
  template <int BITS>
  static __m256i dot(__m256i sum, __m256i codes, __m256i x) {
    __m256i ones = _mm256_set1_epi16(1);
    if (BITS < 8) return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), ones));
    // Two products of full bytes exceed 16 bits; halves of the code don't.
    __m256i low_bits = _mm256_set1_epi8(15);
    __m256i low = _mm256_maddubs_epi16(_mm256_and_si256(codes, low_bits), x);
    __m256i high = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(codes, 4), low_bits), x);
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(low, ones));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(high, _mm256_set1_epi16(16)));
  }
  template <int BITS>
  static I dot(I sum, I codes, I x) {
    return {dot<BITS>(sum.a, codes.a, x.a), dot<BITS>(sum.b, codes.b, x.b)};
  }
  static __m256i twice(__m128i words) {
    __m256i pairs = _mm256_cvtepu32_epi64(words);
    return _mm256_or_si256(pairs, _mm256_slli_epi64(_mm256_srli_epi32(pairs, 4), 32));
  }
  // Eight words of single bits, each for two lanes, its half of the bits lowest in each byte.
  static I load_high(const void* p, int n) {
    char all[32] = {};
    if (n < 32) std::memcpy(all, p, static_cast<size_t>(n));
    const char* words = n < 32 ? all : static_cast<const char*>(p);
    return {twice(half(words)), twice(half(words + 16))};
  }
  // fp32 of the code in the lowest bits of each lane; bits above are ignored.
  template <int BITS>
  static F code(I x) {
    return to_f(mask(x, (1 << BITS) - 1));
  }
  // Bits from STEP * lane of p on, 16 of them at least; others above. Reads up to 8 bytes from p + STEP.
  template <int STEP>
  static I windows(const uint8_t* p) {
    return {eight<STEP>(p), eight<STEP>(p + STEP)};
  }
  template <int STEP>
  static __m256i eight(const uint8_t* p) {
    if (STEP == 2)
      return _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(load_word(p))),
                               _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14));
    int64_t bits;
    std::memcpy(&bits, p, 8);
    // Eight lanes need 51 bits at most, so both halves find theirs in the same eight bytes.
    __m256i own = _mm256_shuffle_epi8(_mm256_set1_epi64x(bits), load_half(steps_of<STEP>.bytes));
    return _mm256_srlv_epi32(own, load_half(steps_of<STEP>.shifts));
  }
  static __m256i load_32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static __m256i load_half(const void* p) { return _mm256_load_si256(static_cast<const __m256i*>(p)); }
  // 64 rows at once, without a shuffle for each eight: lane k of vector r holds row 8k + r until `unmix`. `Mixed` are
  // the bits from row 8k on, and from 16 bits behind it. Reads up to 34 bytes, or 28 for 3 bits a lane.
  template <int STEP>
  static constexpr bool mixes = STEP == 3 || STEP == 4;
  struct Mixed {
    __m256i first, second;
  };
  template <int STEP>
  static Mixed load_mixed(const uint8_t* p) {
    // Not by `load_i`, whose second half reaches beyond the codes.
    if (STEP == 4) return {load_32(p), load_32(p + 2)};
    __m256i own = _mm256_inserti128_si256(_mm256_castsi128_si256(half(p)), half(p + 12), 1);
    __m256i every = _mm256_setr_epi8(0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11, 12, 0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8,
                                     9, 9, 10, 11, 12);
    return {_mm256_shuffle_epi8(own, every), _mm256_shuffle_epi8(own, _mm256_add_epi8(every, _mm256_set1_epi8(2)))};
  }
  template <int STEP, int r>
  static __m256i one_mixed(const Mixed& x) {
    constexpr bool behind = STEP * r >= 16;
    return _mm256_srli_epi32(behind ? x.second : x.first, STEP * r - (behind ? 16 : 0));
  }
  // Vectors 2 * r and 2 * r + 1.
  template <int STEP, int r>
  static I windows_mixed(const Mixed& x) { return {one_mixed<STEP, 2 * r>(x), one_mixed<STEP, 2 * r + 1>(x)}; }
  // Rows in their order.
  static void unmix(I& p, I& q, I& r, I& s) {
    __m256i a[8] = {p.a, p.b, q.a, q.b, r.a, r.b, s.a, s.b}, b[8], c[8];
    repeat<4>([&](auto i) LOPRO_INLINE {
      b[2 * i] = _mm256_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
      b[2 * i + 1] = _mm256_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
    });
    repeat<2>([&](auto i) LOPRO_INLINE {
      c[4 * i] = _mm256_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
      c[4 * i + 1] = _mm256_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
      c[4 * i + 2] = _mm256_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
      c[4 * i + 3] = _mm256_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
    });
    I* all[4] = {&p, &q, &r, &s};
    repeat<4>([&](auto i) LOPRO_INLINE {
      // Rows 8i ... 8i + 7 lie in lane i of the eight.
      __m256i low = _mm256_permute2x128_si256(c[i], c[i + 4], 0x20);
      __m256i high = _mm256_permute2x128_si256(c[i], c[i + 4], 0x31);
      (i % 2 ? all[i / 2]->b : all[i / 2]->a) = low;
      (i % 2 ? all[2 + i / 2]->b : all[2 + i / 2]->a) = high;
    });
  }
  static I times_i(I x, int v) {
    __m256i all = _mm256_set1_epi32(v);
    return {_mm256_mullo_epi32(x.a, all), _mm256_mullo_epi32(x.b, all)};
  }
  // Sums of the bytes 0 and 3, and 1 and 2, of each lane as its halves; or of all four.
  template <int COLUMNS>
  static __m256i sums(__m256i x) {
    __m256i ones = _mm256_set1_epi8(1);
    if (COLUMNS == 1) return _mm256_madd_epi16(_mm256_maddubs_epi16(x, ones), _mm256_set1_epi16(1));
    return _mm256_maddubs_epi16(_mm256_shuffle_epi8(x, outer_inner()), ones);
  }
  template <int COLUMNS>
  static I sums(I x) { return {sums<COLUMNS>(x.a), sums<COLUMNS>(x.b)}; }
  static __m256i outer_inner() {
    return _mm256_setr_epi8(0, 3, 1, 2, 4, 7, 5, 6, 8, 11, 9, 10, 12, 15, 13, 14, 0, 3, 1, 2, 4, 7, 5, 6, 8, 11, 9, 10,
                            12, 15, 13, 14);
  }
  // Products of the halves of lanes, signed.
  static I dot_halves(I sum, I x, I y) {
    return {_mm256_add_epi32(sum.a, _mm256_madd_epi16(x.a, y.a)), _mm256_add_epi32(sum.b, _mm256_madd_epi16(x.b, y.b))};
  }
  // Keeps a sum in its register, and what follows behind it: interleaved blocks of rows would need too many.
  static void hold(I& v) { asm volatile("" : "+x"(v.a), "+x"(v.b)); }
  // For one token, `factor` of a product of states and `spread` of the activations of its columns are multiplied by
  // `dot_factor`: full bytes times int8 would exceed the 16 bits of a pair, so bytes are added up in pairs first.
  template <int COLUMNS>
  static I factor(I x) {
    if (COLUMNS == 2) return sums<2>(x);
    __m256i ones = _mm256_set1_epi8(1);
    return {_mm256_maddubs_epi16(x.a, ones), _mm256_maddubs_epi16(x.b, ones)};
  }
  template <int COLUMNS>
  static uint32_t spread(int a, int b) { return pair(a, COLUMNS == 1 ? a : b); }
  static I dot_factor(I sum, I factor, I x) { return dot_halves(sum, factor, x); }
  // As in avx512.h.
  static void fetch(const void* p) { asm volatile("prefetcht1 %0" ::"m"(*static_cast<const char*>(p))); }
  static void transpose(I* v) {
    int32_t all[16][16];
    for (int i = 0; i < 16; ++i) store_i(all[i], v[i]);
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < i; ++j) {
        int32_t other = all[i][j];
        all[i][j] = all[j][i];
        all[j][i] = other;
      }
    for (int i = 0; i < 16; ++i) v[i] = load_i(all[i]);
  }
};

}  // namespace

}  // namespace lopro
