// The search of every path through the rows of a column (or pair).
//
// A step has 2^window states. State s follows one of the 2^step states that share its upper bits, moved up by `step`, so
// that what leads to it is one number for each value p of its upper bits, the prefix:
//
//   next[p] = least over j of (least[s >> step] + importance * (x - value[s])^2),  s = j << (window - step) | p
//
// `least` of each step is kept, to walk back from the last. Costs are 16-bit integers above the cheapest of the step
// before, and those too large are all the same.
#pragma once

#include "cpu/lanes.h"
#include "rows.h"
#include "spread.h"

namespace lopro {
namespace {

template <int STEP, int PAIR>
class Search {
 public:
  // Steps that fill a window.
  static int64_t near(int64_t window) { return (window + STEP - 1) / STEP; }
  // Whether errors are doubled where they may be: those of 4 bits are too small for the units otherwise.
  static constexpr bool FINE = STEP / PAIR >= 4;

  explicit Search(int64_t window)
      : window_(window), size_(int64_t{1} << window), prefixes_(size_ >> STEP),
        // Sections of one length whose distance is a power of two would share lines of the cache.
        section_(prefixes_ + (prefixes_ >= GROUP ? 2 * SHORTS : 0)), table_(PAIR * (section_ << STEP)) {}

  // Takes the value of each state, of a pair one column after the other; state s is at `order[s]`.
  void read(const float* values, const std::vector<uint16_t>& order) {
    for (int64_t s = 0; s < PAIR * size_; ++s) {
      const int64_t part = s / size_ * size_;
      table_[s / prefixes_ * section_ + s % prefixes_] = fixed(values[part + order[s - part]], VALUE_BITS);
    }
  }

  // Runs through the rows, of which the last is the first step, and returns what leads to each prefix after row 0. State 0
  // comes before the first step, or any state.
  const uint16_t* run(const std::vector<Row>& rows, bool any) {
    const int64_t count = static_cast<int64_t>(rows.size());
    kept_.resize((count + 1) * prefixes_ + SHORTS);
    uint16_t* least = kept_.data() + count * prefixes_;
    std::fill(least, least + prefixes_, any ? 0 : FAR);
    least[0] = 0;
    uint16_t lowest = 0;
    for (int64_t i = count - 1; i >= 0; --i, least -= prefixes_) {
      // While some states are unreached, nothing is taken off: reached ones are never dearer, and come first where equal.
      const uint16_t base = count - i < near(window_) ? 0 : lowest;
      const Change change{base, i ? rows[i - 1].down : 0, i ? rows[i - 1].up : 0};
      lowest = rows[i].coarser < 0 ? advance<-1>(rows[i], change, least, least - prefixes_)
               : rows[i].coarser   ? advance<1>(rows[i], change, least, least - prefixes_)
                                   : advance<0>(rows[i], change, least, least - prefixes_);
    }
    return least;
  }

  // Gives each row from 0 on its state to `put`, on the way back from the prefix of the state after row 0.
  template <class Put>
  void walk(const std::vector<Row>& rows, int64_t prefix, const Put& put) const {
    for (int64_t i = 0; i < static_cast<int64_t>(rows.size()); ++i) {
      const int64_t state = cheapest(rows[i], kept_.data() + (i + 1) * prefixes_, prefix);
      put(i, static_cast<uint16_t>(state));
      prefix = state >> STEP;
    }
  }

  int64_t prefixes() const { return prefixes_; }

 private:
  static constexpr uint16_t FAR = 65535;

  // A row's numbers in every lane.
  struct Lanes {
    Shorts first, second, carry, weight, second_weight;
    int coarser;
    explicit Lanes(const Row& row)
        : first(all(row.first)), second(all(row.second)), carry(all(row.carry)), weight(all(row.weight)),
          second_weight(all(row.second_weight)), coarser(row.coarser) {}
  };

  template <int COARSER>
  __attribute__((always_inline)) static Shorts squared(Shorts error) {
    if (COARSER < 0) error = add(error, error);
    return rounded_product(error, error);
  }

  // Costs of states at a row. COARSER: sign of the row's.
  template <int COARSER>
  __attribute__((always_inline)) static Shorts errors(const int16_t* value, const int16_t* value2, const Lanes& row) {
    Shorts v = load<Shorts>(value);
    if (COARSER > 0) v >>= row.coarser;
    const Shorts error = subtract(row.first, v);
    Shorts cost = costs_product(squared<COARSER>(error), row.weight);
    if (PAIR == 2) {
      Shorts change = product(error, row.carry);
      for (int i = 0; i < 16 - CARRY_BITS; ++i) change = add(change, change);
      Shorts w = load<Shorts>(value2);
      if (COARSER > 0) w >>= row.coarser;
      const Shorts second = subtract(add(row.second, change), w);
      cost = add_costs(cost, costs_product(squared<COARSER>(second), row.second_weight));
    }
    return cost;
  }

  // What is done to costs between two rows: `base` is taken off, then they are moved to the next row's units.
  struct Change {
    uint16_t base;
    int down, up;
  };

  // Prefixes whose costs are found together: each element of a vector of costs is spread over 2^STEP of them.
  static constexpr int64_t GROUP = SHORTS << STEP;
  // Vectors of a group that fit the registers, and no more than the narrowest window has.
  static constexpr int PARTS = std::min(1 << STEP, std::min(8, (1 << (12 - STEP)) / SHORTS));

  // Vectors FIRST + PART of a group: the cheapest ways to prefixes from `prefix` on.
  template <int COARSER, int FIRST, int... PART>
  __attribute__((always_inline)) void reach(const Lanes& row, const uint16_t* least, int64_t prefix, Shorts* best,
                                            std::integer_sequence<int, PART...>) const {
    ((best[PART] = all(FAR)), ...);
    for (int64_t j = 0; j < 1 << STEP; ++j) {
      const Spread<STEP> before(load<Shorts>(least + ((j * prefixes_ + prefix) >> STEP)));
      const int16_t* value = table_.data() + j * section_ + prefix + FIRST * SHORTS;
      const int16_t* value2 = value + (PAIR - 1) * (section_ << STEP);
      ((best[PART] = least_of(best[PART], add_costs(before.template part<FIRST + PART>(),
                                                    errors<COARSER>(value + PART * SHORTS, value2 + PART * SHORTS, row)))),
       ...);
    }
  }

  template <int COARSER, int... PASS>
  __attribute__((always_inline)) Shorts reach_group(const Lanes& row, const Change& change, const uint16_t* least, int64_t prefix,
                                                    uint16_t* next, std::integer_sequence<int, PASS...>) const {
    Shorts lowest = all(FAR);
    const Shorts lower = all(change.base), upper = all(FAR >> change.up);
    const auto pass = [&](auto first) __attribute__((always_inline)) {
      if (decltype(first)::value * SHORTS >= prefixes_) return;
      Shorts best[PARTS];
      reach<COARSER, decltype(first)::value>(row, least, prefix, best, std::make_integer_sequence<int, PARTS>{});
      for (int part = 0; part < PARTS; ++part) {
        const Shorts above = least_of(subtract_costs(best[part], lower), upper);
        const Shorts now = (Shorts)((Costs)above << change.up >> change.down);
        store(next + prefix + (decltype(first)::value + part) * SHORTS, now);
        lowest = least_of(lowest, now);
      }
    };
    (pass(std::integral_constant<int, PASS * PARTS>{}), ...);
    return lowest;
  }

  // One step; returns the least of `next`.
  template <int COARSER>
  uint16_t advance(const Row& numbers, const Change& change, const uint16_t* least, uint16_t* next) const {
    const Lanes row(numbers);
    Shorts lowest = all(FAR);
    for (int64_t p = 0; p < prefixes_; p += GROUP)
      lowest = least_of(lowest, reach_group<COARSER>(row, change, least, p, next,
                                                     std::make_integer_sequence<int, (1 << STEP) / PARTS>{}));
    uint16_t result = FAR;
    for (int i = 0; i < SHORTS; ++i) result = std::min(result, static_cast<uint16_t>(lowest[i]));
    return result;
  }

  // The cheapest at a row of the states that end in `prefix`; the lowest of equal ones.
  int64_t cheapest(const Row& row, const uint16_t* least, int64_t prefix) const {
    const Lanes lanes(row);
    int64_t best = prefix;
    int32_t lowest = INT32_MAX;
    for (int64_t from = 0; from < 1 << STEP; from += SHORTS) {
      int16_t value[SHORTS] = {}, value2[SHORTS] = {};
      const int64_t some = std::min<int64_t>(SHORTS, (1 << STEP) - from);
      for (int64_t i = 0; i < some; ++i) {
        value[i] = table_[(from + i) * section_ + prefix];
        value2[i] = table_[((PAIR - 1 << STEP) + from + i) * section_ + prefix];
      }
      const Shorts error = row.coarser < 0 ? errors<-1>(value, value2, lanes) : errors<1>(value, value2, lanes);
      for (int64_t i = 0; i < some; ++i) {
        const int64_t s = (from + i) * prefixes_ + prefix;
        const int32_t cost = std::min<int32_t>(least[s >> STEP] + static_cast<uint16_t>(error[i]), FAR);
        if (cost < lowest) lowest = cost, best = s;
      }
    }
    return best;
  }

  int64_t window_, size_, prefixes_, section_;
  std::vector<int16_t> table_;
  std::vector<uint16_t> kept_;
};

}  // namespace
}  // namespace lopro
