// Each element of a vector 2^STEP times: 2^STEP vectors.
#pragma once

#include <utility>

#include "shorts.h"

namespace lopro {
namespace {

constexpr auto LANES_OF_SHORTS = std::make_integer_sequence<int, SHORTS>{};

template <int STEP>
class Spread {
 public:
  __attribute__((always_inline)) explicit Spread(Shorts from)
      : low_(arranged<0>(from, LANES_OF_SHORTS)), high_(STEP > 3 ? arranged<1>(from, LANES_OF_SHORTS) : low_) {}

  // Element (PART * SHORTS + i) >> STEP in each lane i.
  template <int PART>
  __attribute__((always_inline)) Shorts part() const {
    return placed<PART>(STEP > 3 && (PART * SHORTS >> STEP) >= SHORTS / 2 ? high_ : low_, LANES_OF_SHORTS);
  }

 private:
#if SHORTS == 16
  // AVX2 shuffles within halves of a register: `arranged` moves elements to the halves that need them, so that `placed`
  // is one instruction.
  template <int HALF, int... I>
  __attribute__((always_inline)) static Shorts arranged(Shorts from, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(from, from, wanted(HALF, I / 8, I % 8)...);
  }
  template <int PART, int... I>
  __attribute__((always_inline)) static Shorts placed(Shorts from, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(from, from, place(PART, I / 8, I % 8)...);
  }
  static constexpr int wanted(int half, int side, int i) {
    return STEP == 2 ? i / 2 * 4 + side * 2 + i % 2 : STEP == 3 ? i * 2 + side : half * 8 + i;
  }
  static constexpr int place(int part, int side, int i) {
    return side * 8 + (STEP == 2 ? part * 2 + i / 4 : STEP == 3 ? part : (part * 16 >> STEP) % 8);
  }
#else
  template <int HALF, int... I>
  __attribute__((always_inline)) static Shorts arranged(Shorts from, std::integer_sequence<int, I...>) {
    return from;
  }
  template <int PART, int... I>
  __attribute__((always_inline)) static Shorts placed(Shorts from, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(from, from, ((PART * SHORTS + I) >> STEP)...);
  }
#endif
  Shorts low_, high_;
};

}  // namespace
}  // namespace lopro
