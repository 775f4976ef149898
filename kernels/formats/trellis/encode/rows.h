// Rows of a column (or pair of columns) of a strip in fixed point, for a search whose costs are 16-bit integers.
//
// Values are multiples of 2^-13, so that those of all states fit. Costs of a row are in units of their own, a power of two
// as fine as the largest weight near it allows: a path is chosen among rows no further apart than a window, and there a
// heavy row outweighs what the units round away of a light one.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "encode.h"

namespace lopro {
namespace {

constexpr int VALUE_BITS = 13, CARRY_BITS = 13;
// Largest value, but for one bit of the last place.
constexpr float RANGE = 1 << (15 - VALUE_BITS);
constexpr int NONE = INT16_MIN;

// Squared error of one column, or of a pair whose first error changes the second target by `carry`:
// weight * e^2 + second_weight * (second + carry * e - value2)^2, e = first - value.
struct Row {
  int16_t first, second, carry;
  uint16_t weight, second_weight;
  // Bits that values are moved down by, for a target outside RANGE; -1 for one well inside, whose errors are doubled.
  int coarser;
  // Bits that costs before this row are moved by, to its units.
  int down, up;
};

inline int16_t fixed(float value, int bits) {
  return static_cast<int16_t>(std::lrint(std::min(std::max(std::ldexp(value, bits), -32767.f), 32767.f)));
}

inline uint16_t portion(float weight, int exponent) {
  return static_cast<uint16_t>(std::min(std::ldexp(weight, 16 - exponent), 65535.f));
}

// Rows [0, count) of a column with the targets `first` and `second`; the second is nullptr for one column.
// `near` is the number of steps that fill a window. Errors beyond half of RANGE are all the same if `fine`. Returns the
// exponent of the unit of costs after row 0, NONE where no row counts.
inline int fill_rows(std::vector<Row>& rows, std::vector<int>& units, const float* first, const float* second,
                      const float* importance, float carry, float ratio, int64_t near, bool fine) {
  const int64_t count = static_cast<int64_t>(rows.size());
  for (int64_t i = 0; i < count; ++i) {
    const float other = second ? second[i] : 0, largest = std::max(std::fabs(first[i]), std::fabs(other));
    int coarser = fine && largest < 0.75f * RANGE ? -1 : 0;
    while (coarser >= 0 && coarser < 14 && std::ldexp(largest, -coarser) >= RANGE) ++coarser;
    const int moved = std::max(coarser, 0), bits = VALUE_BITS - moved;
    rows[i] = {fixed(first[i], bits), fixed(other, bits), fixed(carry, CARRY_BITS), 0, 0, coarser, 0, 0};
    units[i] = NONE;
    const float heaviest = importance[i] * std::max(1.f, ratio);
    if (heaviest > 0) {
      std::frexp(heaviest, &units[i]);
      units[i] += 2 * (coarser < 0 ? -1 : moved);
    }
  }
  int before = NONE;
  for (int64_t i = count - 1; i >= 0; --i) {
    // The first steps share their units: states that no path has reached must stay the dearest.
    const bool begins = i >= count - near;
    const int64_t from = std::max<int64_t>(begins ? count - 2 * near : i - near, 0), to = begins ? count : i + near + 1;
    const int unit = *std::max_element(units.begin() + from, units.begin() + std::min(to, count));
    if (units[i] != NONE) {
      const int exponent = unit - 2 * (rows[i].coarser < 0 ? -1 : rows[i].coarser);
      rows[i].weight = portion(importance[i], exponent), rows[i].second_weight = portion(importance[i] * ratio, exponent);
    }
    const int change = unit == NONE || before == NONE ? 0 : unit - before;
    rows[i].down = std::min(std::max(change, 0), 15), rows[i].up = std::min(std::max(-change, 0), 15);
    if (unit != NONE) before = unit;
  }
  return before;
}

}  // namespace
}  // namespace lopro
