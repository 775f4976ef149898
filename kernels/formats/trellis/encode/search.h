// The search of every path, over vectors of LANES floats (GCC's and Clang's vector types).
//
// A step has 2^window states. State s follows one of the 2^step states that share its upper bits, moved up by `step`:
//
//   cost'[p << step | b] = least over j of cost[j << (window - step) | p] + importance * (x - value[p << step | b])^2
//
// Both parts of a step run in one pass over p, so costs are read and written once. Of each step the winning j is kept,
// a byte for each p, to walk back from the cheapest last state.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "cpu/lanes.h"
#include "encode.h"

namespace lopro {
namespace {

// Element (part * LANES + i) >> STEP of `all` in each lane i.
template <int STEP, int PART, int... I>
__attribute__((always_inline)) inline Floats spread(Floats all, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(all, all, ((PART * LANES + I) >> STEP)...);
}

// Least of the 2^STEP costs at p, and which of them it is, by halves.
template <int STEP>
struct Least {
  __attribute__((always_inline)) static inline void of(const float* cost, int64_t stride, Floats& least, Ints& which) {
    Floats upper;
    Ints above;
    Least<STEP - 1>::of(cost, stride, least, which);
    Least<STEP - 1>::of(cost + (stride << (STEP - 1)), stride, upper, above);
    Ints better = upper < least;
    least = upper < least ? upper : least;
    which = better ? (above | (1 << (STEP - 1))) : which;
  }
};

template <>
struct Least<0> {
  __attribute__((always_inline)) static inline void of(const float* cost, int64_t, Floats& least, Ints& which) {
    least = load<Floats>(cost);
    which = Ints{};
  }
};

// Squared errors of a row: of one column, or of a pair whose first error changes the second target by `carry`.
struct Row {
  float first, second, carry, weight, second_weight;
};

template <int STEP, int PAIR, int PART>
__attribute__((always_inline)) inline void branch(Floats least, const float* value, const float* value2, const Row& row, float* next) {
  Floats cost = spread<STEP, PART>(least, std::make_integer_sequence<int, LANES>{});
  Floats error = row.first - load<Floats>(value + PART * LANES);
  cost += row.weight * (error * error);
  if (PAIR == 2) {
    Floats second = row.second + row.carry * error - load<Floats>(value2 + PART * LANES);
    cost += row.second_weight * (second * second);
  }
  store(next + PART * LANES, cost);
}

template <int STEP, int PAIR, int... PART>
__attribute__((always_inline)) inline void branches(Floats least, const float* value, const float* value2, const Row& row, float* next,
                     std::integer_sequence<int, PART...>) {
  (branch<STEP, PAIR, PART>(least, value, value2, row, next), ...);
}

// The winners of four vectors of prefixes share one vector, a byte each.
constexpr int64_t GROUP = 4 * LANES;

// Place of a prefix's byte.
inline int64_t place(int64_t prefix) {
  return prefix / GROUP * GROUP + prefix % LANES * 4 + prefix % GROUP / LANES;
}

template <int STEP, int PAIR>
void advance(int window, const float* table, const Row row, const float* cost, float* next, uint8_t* back) {
  const int64_t prefixes = int64_t{1} << (window - STEP), size = int64_t{1} << window;
  for (int64_t p = 0; p < prefixes; p += GROUP) {
    Ints winners = {};
    for (int part = 0; part < 4; ++part) {
      const int64_t at = p + part * LANES;
      Floats least;
      Ints which;
      Least<STEP>::of(cost + at, prefixes, least, which);
      winners |= which << (8 * part);
      const float* value = table + (at << STEP);
      branches<STEP, PAIR>(least, value, value + size, row, next + (at << STEP),
                           std::make_integer_sequence<int, 1 << STEP>{});
    }
    store(back + p, winners);
  }
}

struct Memory {
  std::vector<float> costs;
  std::vector<uint8_t> back;
};

// States of one column (or pair) of a strip; row `count - 1` is the first step, state 0 comes before it.
template <int STEP, int PAIR>
void search(int window, int64_t count, const float* table, const std::vector<Row>& rows, Memory& memory,
            uint16_t* states) {
  const int64_t size = int64_t{1} << window, prefixes = size >> STEP;
  memory.costs.resize(2 * size);
  memory.back.resize(count * prefixes);
  float *cost = memory.costs.data(), *next = cost + size;
  std::fill(cost, cost + size, 1e30f);
  cost[0] = 0;
  for (int64_t i = count - 1; i >= 0; --i) {
    advance<STEP, PAIR>(window, table, rows[i], cost, next, memory.back.data() + i * prefixes);
    std::swap(cost, next);
  }
  int64_t state = std::min_element(cost, cost + size) - cost;
  for (int64_t i = 0; i < count; ++i) {
    states[i] = static_cast<uint16_t>(state);
    int64_t prefix = state >> STEP;
    state = prefix | static_cast<int64_t>(memory.back[i * prefixes + place(prefix)]) << (window - STEP);
  }
}

// All columns of one strip, which begins at row `first`.
template <int STEP, int PAIR>
void encode_strip(const Columns& b, int64_t first, int64_t count) {
  static thread_local Memory memory;
  std::vector<Row> rows(count);
  const int64_t size = int64_t{1} << b.window;
  const float* importance = b.importance + first;
  for (int64_t j = 0; j < b.width; j += PAIR) {
    const float *column = b.columns + j * b.rows + first, *target = b.target + j * b.rows + first;
    float carry = PAIR == 2 ? b.upper[j * b.width + j + 1] : 0;
    float ratio = PAIR == 2 ? b.pivots[j + 1] / b.pivots[j] : 0;
    for (int64_t i = 0; i < count; ++i) {
      rows[i] = {target[i], 0, carry, importance[i], importance[i] * ratio};
      // The target of the second column, but for its part in the first one's rounding error.
      if (PAIR == 2) rows[i].second = target[b.rows + i] + carry * (column[i] - target[i]);
    }
    uint16_t* states = b.states + j / PAIR * b.rows + first;
    search<STEP, PAIR>(static_cast<int>(b.window), count, b.table, rows, memory, states);
    for (int64_t part = 0; part < PAIR; ++part) {
      float* error = b.error + (j + part) * b.rows + first;
      for (int64_t i = 0; i < count; ++i) error[i] = column[part * b.rows + i] - b.table[part * size + states[i]];
      const float* upper = b.upper + (j + part) * b.width;
      for (int64_t k = j + PAIR; k < b.width; ++k) {
        float* later = b.target + k * b.rows + first;
        const float factor = upper[k];
        for (int64_t i = 0; i < count; ++i) later[i] += factor * error[i];
      }
    }
  }
}

void encode(const Columns& b) {
  std::vector<int64_t> first(b.count, 0);
  for (int64_t s = 1; s < b.count; ++s) first[s] = first[s - 1] + b.strips[s - 1];
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic, 1)
#endif
  for (int64_t s = 0; s < b.count; ++s) {
    switch (b.step * 4 + b.pair) {
      case 2 * 4 + 1: encode_strip<2, 1>(b, first[s], b.strips[s]); break;
      case 3 * 4 + 1: encode_strip<3, 1>(b, first[s], b.strips[s]); break;
      case 4 * 4 + 1: encode_strip<4, 1>(b, first[s], b.strips[s]); break;
      case 3 * 4 + 2: encode_strip<3, 2>(b, first[s], b.strips[s]); break;
      case 4 * 4 + 2: encode_strip<4, 2>(b, first[s], b.strips[s]); break;
      default: encode_strip<5, 2>(b, first[s], b.strips[s]); break;
    }
  }
}

}  // namespace
}  // namespace lopro
