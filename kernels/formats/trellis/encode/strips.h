// Columns of strips, one (or a pair) after another, with feedback.
#pragma once

#include "search.h"

namespace lopro {
namespace {

// All columns of one strip, which begins at row `start`.
template <int STEP, int PAIR>
void encode_strip(const Columns& b, int64_t start, int64_t count) {
  using Own = Search<STEP, PAIR>;
  Own search(b.window);
  const int64_t size = int64_t{1} << b.window;
  search.read(b.table);
  std::vector<Row> rows(count);
  std::vector<int> units(count);
  std::vector<float> second(PAIR == 2 ? count : 0);
  for (int64_t j = 0; j < b.width; j += PAIR) {
    const float *column = b.columns + j * b.rows + start, *target = b.target + j * b.rows + start;
    const float carry = PAIR == 2 ? b.upper[j * b.width + j + 1] : 0;
    const float ratio = PAIR == 2 ? b.pivots[j + 1] / b.pivots[j] : 0;
    // The target of the second column, but for its part in the first one's rounding error.
    for (int64_t i = 0; i < count && PAIR == 2; ++i) second[i] = target[b.rows + i] + carry * (column[i] - target[i]);
    fill_rows(rows, units, target, PAIR == 2 ? second.data() : nullptr, b.importance + start, carry, ratio,
              Own::near(b.window), Own::FINE);
    uint16_t* states = b.states + j / PAIR * b.rows + start;
    search.states(rows, states);
    for (int64_t part = 0; part < PAIR; ++part) {
      float* error = b.error + (j + part) * b.rows + start;
      for (int64_t i = 0; i < count; ++i) error[i] = column[part * b.rows + i] - b.table[part * size + states[i]];
      const float* upper = b.upper + (j + part) * b.width;
      for (int64_t k = j + PAIR; k < b.width; ++k) {
        float* later = b.target + k * b.rows + start;
        const float factor = upper[k];
        for (int64_t i = 0; i < count; ++i) later[i] += factor * error[i];
      }
    }
  }
}

void encode(const Columns& b) {
  std::vector<int64_t> start(b.count, 0);
  for (int64_t s = 1; s < b.count; ++s) start[s] = start[s - 1] + b.strips[s - 1];
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic, 1)
#endif
  for (int64_t s = 0; s < b.count; ++s) {
    switch (b.step * 4 + b.pair) {
      case 2 * 4 + 1: encode_strip<2, 1>(b, start[s], b.strips[s]); break;
      case 3 * 4 + 1: encode_strip<3, 1>(b, start[s], b.strips[s]); break;
      case 4 * 4 + 1: encode_strip<4, 1>(b, start[s], b.strips[s]); break;
      case 3 * 4 + 2: encode_strip<3, 2>(b, start[s], b.strips[s]); break;
      case 4 * 4 + 2: encode_strip<4, 2>(b, start[s], b.strips[s]); break;
      default: encode_strip<5, 2>(b, start[s], b.strips[s]); break;
    }
  }
}

}  // namespace
}  // namespace lopro
