// The path that kernels run: each is compiled once for each path, in a namespace of the path's name.
#pragma once

namespace lopro {

enum class Path { avx512, avx2, portable };

// The fastest that this processor has, or a lower one that LOPRO_FX_CPU_ISA names.
Path path();

}  // namespace lopro

// Declares a kernel's function for each path, and `run`, which calls that of the current one.
#if defined(__x86_64__)
#define LOPRO_KERNEL(Operands)                               \
  namespace lopro {                                          \
  namespace avx512 { void run(const Operands& site); }       \
  namespace avx2 { void run(const Operands& site); }         \
  namespace portable { void run(const Operands& site); }     \
  inline void run(const Operands& site) {                    \
    switch (path()) {                                        \
      case Path::avx512: return avx512::run(site);           \
      case Path::avx2: return avx2::run(site);               \
      default: return portable::run(site);                   \
    }                                                        \
  }                                                          \
  }
#else
#define LOPRO_KERNEL(Operands)                               \
  namespace lopro {                                          \
  namespace portable { void run(const Operands& site); }     \
  inline void run(const Operands& site) { portable::run(site); } \
  }
#endif
