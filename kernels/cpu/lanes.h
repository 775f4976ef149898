// Vectors of LANES floats, as wide as the path's registers (GCC's and Clang's vector types).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

namespace lopro {
namespace {

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));

template <class T>
__attribute__((always_inline)) inline T load(const void* p) {
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}

template <class T>
__attribute__((always_inline)) inline void store(void* p, T value) {
  std::memcpy(p, &value, sizeof(T));
}

}  // namespace
}  // namespace lopro
