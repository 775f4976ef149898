// A strip's search in two halves that meet in the middle, so that two threads can share it.
//
// The lower half begins with the last row, after state 0. The upper half runs backwards from row 0: what follows a state
// is one number for each value of its lower bits, so that with the bits of all states reversed it is the same search.
#pragma once

#include "search.h"

namespace lopro {
namespace {

// The states 0 to 2^window - 1, in their order or with the bits of each reversed.
inline std::vector<uint16_t> in_order(int64_t window, bool reversed) {
  std::vector<uint16_t> order(int64_t{1} << window);
  for (int64_t s = 0; s < static_cast<int64_t>(order.size()); ++s)
    for (int64_t bit = 0; bit < window; ++bit) order[s] |= (s >> bit & 1) << (reversed ? window - 1 - bit : bit);
  return order;
}

template <int STEP, int PAIR>
class Half {
 public:
  // Rows [start, start + count) of the weight.
  Half(const Columns& b, int64_t start, int64_t count, bool upper)
      : b_(b), start_(start), count_(count), upper_(upper), order_(in_order(b.window, upper)), search_(b.window),
        rows_(count), units_(count), first_(count), second_(count), importance_(count) {
    search_.read(b.table, order_);
    for (int64_t i = 0; i < count; ++i) importance_[i] = b.importance[row(i)];
  }

  // Searches column j (and the next).
  void run(int64_t j) {
    const float *column = b_.columns + j * b_.rows, *target = b_.target + j * b_.rows;
    const float carry = PAIR == 2 ? b_.upper[j * b_.width + j + 1] : 0;
    const float ratio = PAIR == 2 ? b_.pivots[j + 1] / b_.pivots[j] : 0;
    for (int64_t i = 0; i < count_; ++i) {
      const int64_t r = row(i);
      first_[i] = target[r];
      // The target of the second column, but for its part in the first one's rounding error.
      if (PAIR == 2) second_[i] = target[b_.rows + r] + carry * (column[r] - target[r]);
    }
    unit_ = fill_rows(rows_, units_, first_.data(), PAIR == 2 ? second_.data() : nullptr, importance_.data(), carry, ratio,
                      search_.near(b_.window), search_.FINE);
    costs_ = search_.run(rows_, upper_);
  }

  // Prefix of the cheapest way through both halves, of the first state of the upper one.
  int64_t meet(const Half& upper) const {
    // Costs in the finer of both units; those that differ by more than all of a cost's bits are decided by one half.
    const int apart = unit_ == NONE || upper.unit_ == NONE ? 0 : std::min(std::max(unit_ - upper.unit_, -24), 24);
    uint64_t lowest = UINT64_MAX;
    int64_t best = 0;
    for (int64_t p = 0; p < search_.prefixes(); ++p) {
      const uint64_t cost = (uint64_t{costs_[p]} << std::max(apart, 0)) +
                            (uint64_t{upper.costs_[upper.order_[p << STEP]]} << std::max(-apart, 0));
      if (cost < lowest) lowest = cost, best = p;
    }
    return best;
  }

  // Writes the states of column j, and their errors into the targets of later ones.
  void finish(int64_t j, int64_t prefix) {
    const int64_t size = int64_t{1} << b_.window;
    uint16_t* states = b_.states + j / PAIR * b_.rows;
    search_.walk(rows_, upper_ ? order_[prefix << STEP] : prefix,
                 [&](int64_t i, uint16_t state) { states[row(i)] = order_[state]; });
    for (int64_t part = 0; part < PAIR; ++part) {
      const float* column = b_.columns + (j + part) * b_.rows + start_;
      float* error = b_.error + (j + part) * b_.rows + start_;
      for (int64_t i = 0; i < count_; ++i) error[i] = column[i] - b_.table[part * size + states[start_ + i]];
      const float* upper = b_.upper + (j + part) * b_.width;
      for (int64_t k = j + PAIR; k < b_.width; ++k) {
        float* later = b_.target + k * b_.rows + start_;
        const float factor = upper[k];
        for (int64_t i = 0; i < count_; ++i) later[i] += factor * error[i];
      }
    }
  }

 private:
  // Row of the weight; the last one of a half is the first step.
  int64_t row(int64_t i) const { return upper_ ? start_ + count_ - 1 - i : start_ + i; }

  const Columns& b_;
  int64_t start_, count_;
  bool upper_;
  std::vector<uint16_t> order_;
  Search<STEP, PAIR> search_;
  std::vector<Row> rows_;
  std::vector<int> units_;
  std::vector<float> first_, second_, importance_;
  int unit_ = NONE;
  const uint16_t* costs_ = nullptr;
};

}  // namespace
}  // namespace lopro
