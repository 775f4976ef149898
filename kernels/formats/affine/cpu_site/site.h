// Operands of one call of lopro::cpu_site, the same for every path (avx512.cpp, avx2.cpp, portable.cpp).
#pragma once

#include <cstdint>

namespace lopro {

enum class Type { none, f32, f16, bf16, i8, i16, i32 };

// Tensors other than x are contiguous. Names, shapes and the packed format are those of reference.py.
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

  const uint32_t* codes;
  const void* scales;
  Type scales_type;  // f16, or f32 for weights outside its range
  const uint32_t* zeros;
  int64_t zero_words, out, groups, group, bits;

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

void run_portable(const Site& site);
#if defined(__x86_64__)
void run_avx2(const Site& site);
void run_avx512(const Site& site);
#endif

// "avx512", "avx2" or "portable": the fastest that this processor has, or a lower one that LOPRO_FX_CPU_ISA names.
const char* path();
// Returns false and changes nothing if this processor can't run it.
bool set_path(const char* name);
void run(const Site& site);

}  // namespace lopro
