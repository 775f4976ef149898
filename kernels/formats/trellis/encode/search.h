// The search of every path.
//
// A step has 2^window states. State s follows one of the 2^step states that share its upper bits, moved up by `step`:
//
//   least[p] = least over j of cost[j << (window - step) | p]
//   cost'[p << step | b] = least[p] + importance * (x - value[p << step | b])^2
//
// Both run in one pass over p, so costs are read and written once. `least` of each step is kept, to walk back from the
// cheapest last state. Costs are 16-bit integers above the cheapest of the step before, and those too large are all the same.
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
        section_(prefixes_ + ((SHORTS << STEP) <= prefixes_ ? 32 : 0)), costs_(2 * (section_ << STEP)) {}

  // States of rows [0, count). The last row is the first step, and state 0 comes before it.
  void states(const int16_t* table, const std::vector<Row>& rows, uint16_t* found) {
    const int64_t count = static_cast<int64_t>(rows.size());
    kept_.resize(count * prefixes_);
    std::fill(costs_.begin(), costs_.end(), FAR);
    uint16_t *cost = costs_.data(), *next = cost + (section_ << STEP);
    cost[0] = 0;
    uint16_t lowest = 0;
    for (int64_t i = count - 1; i >= 0; --i) {
      // While some states are unreached, nothing is taken off: reached ones are never dearer, and come first where equal.
      const uint16_t base = count - 1 - i < near(window_) ? 0 : lowest;
      uint16_t* kept = kept_.data() + i * prefixes_;
      lowest = rows[i].coarser < 0 ? advance<-1>(table, rows[i], base, cost, next, kept)
               : rows[i].coarser   ? advance<1>(table, rows[i], base, cost, next, kept)
                                   : advance<0>(table, rows[i], base, cost, next, kept);
      std::swap(cost, next);
    }
    int64_t state = std::min_element(cost, cost + (section_ << STEP)) - cost;
    state = state / section_ * prefixes_ + state % section_;
    for (int64_t i = 0; i < count; ++i) {
      found[i] = static_cast<uint16_t>(state);
      if (i + 1 < count) state = before(table, rows[i + 1], kept_.data() + (i + 1) * prefixes_, state >> STEP);
    }
  }

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

  template <int HALVES>
  __attribute__((always_inline)) Shorts least(const uint16_t* cost) const {
    if constexpr (HALVES == 0) {
      return load<Shorts>(cost);
    } else {
      return least_of(least<HALVES - 1>(cost), least<HALVES - 1>(cost + (section_ << (HALVES - 1))));
    }
  }

  template <int COARSER, int... PART>
  __attribute__((always_inline)) static void branches(Shorts least, const int16_t* value, const int16_t* value2,
                                                      const Lanes& row, uint16_t* next,
                                                      std::integer_sequence<int, PART...>) {
    const Spread<STEP> spread(least);
    (store(next + PART * SHORTS, add_costs(spread.template part<PART>(),
                                           errors<COARSER>(value + PART * SHORTS, value2 + PART * SHORTS, row))),
     ...);
  }

  // One step; returns the least of `kept`.
  template <int COARSER>
  uint16_t advance(const int16_t* table, const Row& numbers, uint16_t base, const uint16_t* cost, uint16_t* next,
                   uint16_t* kept) const {
    const Lanes row(numbers);
    const Shorts lower = all(base), upper = all(FAR >> numbers.up);
    const int up = numbers.up, down = numbers.down;
    Shorts lowest = all(FAR);
    for (int64_t p = 0; p < prefixes_; p += SHORTS) {
      const Shorts above = least_of(subtract_costs(least<STEP>(cost + p), lower), upper);
      const Shorts now = (Shorts)((Costs)above << up >> down);
      store(kept + p, now);
      lowest = least_of(lowest, now);
      const int16_t* value = table + (p << STEP);
      const int64_t state = p << STEP;
      branches<COARSER>(now, value, value + size_, row, next + state / prefixes_ * section_ + state % prefixes_,
                        std::make_integer_sequence<int, 1 << STEP>{});
    }
    uint16_t result = FAR;
    for (int i = 0; i < SHORTS; ++i) result = std::min(result, static_cast<uint16_t>(lowest[i]));
    return result;
  }

  // The state at a row that leads to `prefix` at the least cost; the lowest of equal ones.
  int64_t before(const int16_t* table, const Row& row, const uint16_t* kept, int64_t prefix) const {
    const Lanes lanes(row);
    int64_t best = 0;
    int32_t least = INT32_MAX;
    for (int64_t j = 0; j < 1 << STEP; ++j) {
      const int64_t state = j << (window_ - STEP) | prefix;
      int16_t value[SHORTS] = {table[state]}, value2[SHORTS] = {PAIR == 2 ? table[size_ + state] : int16_t{0}};
      const Shorts error = row.coarser < 0 ? errors<-1>(value, value2, lanes) : errors<1>(value, value2, lanes);
      const int32_t cost = std::min<int32_t>(kept[state >> STEP] + static_cast<uint16_t>(error[0]), FAR);
      if (cost < least) least = cost, best = state;
    }
    return best;
  }

  int64_t window_, size_, prefixes_, section_;
  std::vector<uint16_t> costs_, kept_;
};

}  // namespace
}  // namespace lopro
