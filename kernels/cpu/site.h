// Operands of a call that are the same for every format, and for every path (avx512.h, avx2.h, portable.h).
#pragma once

#include <cstdint>

namespace lopro {

enum class Type { none, f32, f16, bf16, i8, i16, i32 };

// Tensors other than x are contiguous. Names and shapes are those of the operators' definitions.
struct Site {
  const void* x;
  Type type;  // of x and y
  int64_t tokens, in, column_stride;
  int64_t dims;  // leading dimensions of x
  const int64_t *sizes, *strides;

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

  bool int8;
  void* y;
};

}  // namespace lopro
