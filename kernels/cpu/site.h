// Operands of a call that are the same for every format, and for every path (avx512.h, avx2.h, portable.h).
#pragma once

#include <cstdint>

namespace lopro {

enum class Type { none, f32, f16, bf16, i8, i16, i32, i64 };

// Tensors other than x are contiguous. Names and shapes are those of the operators' definitions.
struct Site {
  const void* x;
  Type type;  // of x and y
  int64_t tokens, in, column_stride;
  int64_t dims;  // leading dimensions of x
  const int64_t *sizes, *strides;
  // Rows of y that an expert has, (tokens,): row i is of token i / slots of x. Null: token i of x has row i of y.
  const int64_t* rows;
  int64_t slots;
  const float* rotated;  // (tokens of x, in), the rotated activation where it is known; else null

  const void* perm;
  Type perm_type;
  const uint8_t* signs;
  int64_t block, skip;

  const void* down;
  Type down_type;
  const void* down_scale;
  Type down_scale_type;
  int64_t rank;

  int64_t out;
  const void* scales;
  Type scales_type;  // f16, or f32 for weights outside its range

  const void* bias;
  Type bias_type;
  const void* up;
  Type up_type;
  const void* up_scale;
  Type up_scale_type;
  int64_t parts;  // 0 without up_scale
  const uint16_t* core;  // f16 (rank, rank) between down and up, or null

  bool int8;      // activations are rounded, to integers of at most
  float largest;  // in magnitude
  int64_t act_group;  // columns that share a step: 32, 64, 128, -1 for all, or 0 for as many as the rotation suggests
  void* y;
};

// Sites that differ in their tensors and rows alone.
template <class S>
struct Sites {
  const S* first;
  int64_t count;
  // Memory for the rotated activation of all `tokens` of x, which the sites read; null: each rotates what it reads.
  float* rotated;
  int64_t tokens;
};

}  // namespace lopro
