// Sizes that follow from a site, and where the bits of a row lie.
#pragma once

#include "cpu/common.h"
#include "site.h"

namespace lopro {
namespace {

constexpr int MULTIPLIER = static_cast<int>(0x83DCD12Du);

struct Plan : Sizes {
  int64_t states;  // of a row: columns, or pairs of them
};

inline Plan make_plan(const TrellisSite& s) {
  Plan p = {make_sizes(s, log_block_for(s))};
  p.states = ceil_div(s.in, s.columns);
  return p;
}

// The strings of one strip: that of state c begins at codes + c * stride.
struct Strip {
  const uint8_t* codes;
  int64_t stride;     // bytes of a string
  int64_t row, rows;  // first row of the weight, and rows without padding
};

inline Strip strip_at(const TrellisSite& s, const Plan& p, int64_t index) {
  Strip strip;
  strip.row = index * s.strip;
  strip.rows = index + 1 < s.strips ? s.strip : s.out - strip.row;
  strip.stride = round_up(strip.rows, 32) / 8 * s.step;
  // Strips before this one have whole words of 32 rows, and no padding.
  strip.codes = s.codes + strip.row / 8 * s.step * p.states;
  return strip;
}

// Bytes of zeros after a copied end of a string, at least what a load reaches beyond its rows.
constexpr int64_t AFTER = 16;

// Copies the bits of the last 32 rows of `count` strings, with zeros after each: `stride` bytes apart.
template <int STEP>
struct Ends {
  static constexpr int64_t bytes = 4 * STEP, stride = bytes + AFTER;
  static void copy(const Strip& strip, int64_t state, int64_t count, uint8_t* out) {
    const uint8_t* from = strip.codes + state * strip.stride + strip.stride - bytes;
    for (int64_t c = 0; c < count; ++c, from += strip.stride, out += stride) {
      std::memcpy(out, from, bytes);
      std::memset(out + bytes, 0, AFTER);
    }
  }
};

// What the products of a byte sum with activations exceed those of a weight in units by.
template <int COLUMNS>
constexpr int CENTRE = COLUMNS == 1 ? 510 : 255;

constexpr float UNIT = 1.0f / 128;

}  // namespace
}  // namespace lopro
