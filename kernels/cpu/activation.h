// The activation of one token: gathered, rotated, projected, rounded.
#pragma once

#include "common.h"

namespace lopro {
namespace {

// Token `token` of x in fp32.
template <class V>
void load_token(const Site& s, int64_t token, float* out) {
  int64_t offset = 0;
  for (int64_t d = s.dims - 1, rest = token; d >= 0; rest /= s.sizes[d], --d)
    offset += rest % s.sizes[d] * s.strides[d];
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
void rotate(const Site& s, const Sizes& p, int64_t token, float* raw, float* out) {
  int64_t source = source_of(s, token);
  if (s.rotated) {
    std::memcpy(out, s.rotated + source * s.in, static_cast<size_t>(s.in) * 4);
    std::memset(out + s.in, 0, static_cast<size_t>(p.columns + 16 - s.in) * 4);
    return;
  }
  load_token<V>(s, source, s.perm ? raw : out);
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

// Products of rows r ... r + R - 1 of `down` with T tokens.
template <class V, int R, int T>
void project_rows(const Site& s, int64_t r, const float* x, int64_t stride, float (&out)[R][T]) {
  using F = typename V::F;
  F sum[R][T];
  repeat<R>([&](auto i) LOPRO_INLINE { repeat<T>([&](auto t) LOPRO_INLINE { sum[i][t] = V::zero(); }); });
  auto step = [&](int64_t j, int n) LOPRO_INLINE {
    repeat<R>([&](auto i) LOPRO_INLINE {
      int64_t at = (r + i) * s.in + j;
      F a = s.down_type == Type::i8 ? V::load_i8(static_cast<const int8_t*>(s.down) + at, n)
                                    : V::load_f16(static_cast<const uint16_t*>(s.down) + at, n);
      repeat<T>([&](auto t) LOPRO_INLINE { sum[i][t] = V::fma(a, V::load(x + t * stride + j), sum[i][t]); });
    });
  };
  int64_t j = 0;
  for (; j + 16 <= s.in; j += 16) step(j, 16);
  if (j < s.in) step(j, static_cast<int>(s.in - j));
  repeat<R>([&](auto i) LOPRO_INLINE { repeat<T>([&](auto t) LOPRO_INLINE { out[i][t] = V::reduce(sum[i][t]); }); });
}

// From scales ∘ (down · x) to what `up` multiplies: times the core, then the scales of each part; zeros after it.
template <class V>
void finish_latent(const Site& s, const Sizes& p, float* latent) {
  for (int64_t r = s.rank; r < p.lanes; ++r) latent[r] = 0.0f;
  if (s.core) {
    Scratch scratch(p.lanes * 4);
    float* raw = scratch.take<float>(p.lanes);
    std::memcpy(raw, latent, static_cast<size_t>(p.lanes) * 4);
    for (int64_t r = 0; r < s.rank; ++r) {
      typename V::F sum = V::zero();
      for (int64_t j = 0; j < s.rank; j += 16) {
        int n = static_cast<int>(least(16, s.rank - j));
        sum = V::fma(V::load_f16(s.core + r * s.rank + j, n), V::load(raw + j), sum);
      }
      latent[r] = V::reduce(sum);
    }
  }
  // The first part last: its scales replace what the others read.
  for (int64_t part = s.parts - 1; part >= 0; --part) {
    for (int64_t r = 0; r < s.rank; ++r)
      latent[part * p.lanes + r] = latent[r] * load_scalar(s.up_scale, s.up_scale_type, part * s.rank + r);
    for (int64_t r = s.rank; r < p.lanes; ++r) latent[part * p.lanes + r] = 0.0f;
  }
}

// latents[t] = scales ∘ (core · scales ∘ (down · x[t])), T tokens at once.
template <class V, int T>
void project(const Site& s, const Sizes& p, const float* x, int64_t stride, Token* tokens) {
  constexpr int R = T == 1 ? 4 : 1;
  for (int64_t first = 0; first < s.rank; first += R) {
    float products[R][T];
    if (first + R <= s.rank) project_rows<V, R, T>(s, first, x, stride, products);
    else
      for (int64_t r = first; r < s.rank; ++r)
        project_rows<V, 1, T>(s, r, x, stride, reinterpret_cast<float(&)[1][T]>(products[r - first]));
    for (int64_t r = first; r < least(first + R, s.rank); ++r) {
      float scale = s.down_scale ? load_scalar(s.down_scale, s.down_scale_type, r) : 1.0f;
      for (int t = 0; t < T; ++t) tokens[t].latent[r] = products[r - first][t] * scale;
    }
  }
  for (int t = 0; t < T; ++t) finish_latent<V>(s, p, tokens[t].latent);
}

// Steps and sums of the blocks of x; with INT8, also x as integers up to `largest` in the order of the columns.
template <class V, bool INT8>
void round_blocks(const Sizes& p, const float* x, float largest, int8_t* rounded, Token& token) {
  using F = typename V::F;
  int64_t b = 0;
  float step = 0.0f;
  F factor = V::zero(), above = V::set(largest), below = V::set(-largest);
  for (; b < p.columns / p.block; ++b) {
    const float* part = x + b * p.block;
    F sum = V::zero();
    if (INT8) {
      if (b % p.shared == 0) {
        F top = V::zero(), poison = V::zero();
        int64_t end = least(p.columns - b * p.block, p.shared * p.block);
        for (int64_t j = 0; j < end; j += 16) {
          F v = V::load(part + j);
          top = V::max(top, V::abs(v));
          poison = V::fma(v, V::zero(), poison);  // NaN where v is not finite
        }
        float most = V::reduce_max(top) + V::reduce(poison);
        // As in activation/reference.py: zeros, and no subnormal step.
        float top_value = most * p.clip;
        factor = V::set(most > 1e-30f ? largest / top_value : most != most ? most : 0.0f);
        step = most > 1e-30f || most != most ? top_value * (1.0f / largest) : 0.0f;
      }
      for (int64_t j = 0; j < p.block; j += 16) {
        F v = V::min(V::max(V::mul(V::load(part + j), factor), below), above);
        sum = V::add(sum, V::round_i8(v, rounded + b * p.block + j));
      }
      token.steps[b] = step;
      token.sums[b] = V::reduce(sum) * step;
    } else {
      for (int64_t j = 0; j < p.block; j += 16) sum = V::add(sum, V::load(part + j));
      token.sums[b] = V::reduce(sum);
    }
  }
  for (; b < p.padded_blocks; ++b) token.steps[b] = token.sums[b] = 0.0f;
}

// Floats of all latents of a token.
inline int64_t latent_size(const Site& s, const Sizes& p) { return (s.parts > 1 ? s.parts : 1) * p.lanes; }

}  // namespace
}  // namespace lopro
