// Columns of strips, one (or a pair) after another, with feedback; a thread or two for each strip.
#pragma once

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "half.h"

namespace lopro {
namespace {

// Rows of the shortest strip that is searched in two halves. In a half all prefixes have to be reached.
constexpr int64_t SPLIT = 64;

// Where both threads of a pair wait for one another; asleep, so that what else runs on the processor delays them least.
class Meeting {
 public:
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const int turn = turn_;
    if (arrived_ = !arrived_) {
      both_.wait(lock, [&] { return turn_ != turn; });
    } else {
      ++turn_;
      both_.notify_one();
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable both_;
  bool arrived_ = false;
  int turn_ = 0;
};

template <int STEP, int PAIR>
void encode_strip(const Columns& b, int64_t start, int64_t count) {
  const int64_t middle = count < SPLIT ? 0 : count / 2;
  Half<STEP, PAIR> upper(b, start, middle, true), lower(b, start + middle, count - middle, false);
  for (int64_t j = 0; j < b.width; j += PAIR) {
    upper.run(j), lower.run(j);
    const int64_t prefix = lower.meet(upper);
    upper.finish(j, prefix), lower.finish(j, prefix);
  }
}

// One half of what `encode_strip` does; the other thread makes the other half, and each fills its own of `halves`.
template <int STEP, int PAIR>
void encode_half(const Columns& b, int64_t start, int64_t count, bool is_upper, Meeting& meeting,
                 std::unique_ptr<Half<STEP, PAIR>>* halves) {
  const int64_t middle = count / 2;
  // Made by the thread that reads it, for memory near its core.
  halves[is_upper] = is_upper ? std::make_unique<Half<STEP, PAIR>>(b, start, middle, true)
                              : std::make_unique<Half<STEP, PAIR>>(b, start + middle, count - middle, false);
  Half<STEP, PAIR>& own = *halves[is_upper];
  for (int64_t j = 0; j < b.width; j += PAIR) {
    own.run(j);
    meeting.wait();
    const int64_t prefix = halves[0]->meet(*halves[1]);
    // The next column may not begin while the other thread reads this one's costs.
    meeting.wait();
    own.finish(j, prefix);
  }
  meeting.wait();
}

// Whether two threads for each strip are done before one for each: `rows` of the longest thread, strips in their order.
inline bool shared(const Columns& b, int64_t threads) {
  const auto longest = [&](int64_t workers) {
    std::vector<int64_t> rows(std::max<int64_t>(workers, 1), 0);
    for (int64_t s = 0; s < b.count; ++s) *std::min_element(rows.begin(), rows.end()) += b.strips[s];
    return *std::max_element(rows.begin(), rows.end());
  };
  const int64_t shortest = *std::min_element(b.strips, b.strips + b.count);
  return threads > 1 && shortest >= SPLIT && longest(threads / 2) / 2 < longest(threads);
}

template <int STEP, int PAIR>
void encode_strips(const Columns& b) {
  std::vector<int64_t> start(b.count, 0);
  for (int64_t s = 1; s < b.count; ++s) start[s] = start[s - 1] + b.strips[s - 1];
  int64_t threads = 1;
#ifdef _OPENMP
  threads = std::min<int64_t>(omp_get_max_threads(), 2 * b.count);
  if (shared(b, threads)) threads = threads / 2 * 2;
#endif
  std::vector<Meeting> meetings(threads);
  std::vector<std::unique_ptr<Half<STEP, PAIR>>> halves(2 * b.count);
  std::atomic<int64_t> next{0};
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
#endif
  {
    int64_t own = 0, all = 1;
#ifdef _OPENMP
    own = omp_get_thread_num(), all = omp_get_num_threads();
#endif
    // Fewer threads may have come than were asked for.
    if (all % 2 == 0 && shared(b, all)) {
      for (int64_t s = own / 2; s < b.count; s += all / 2)
        encode_half<STEP, PAIR>(b, start[s], b.strips[s], own % 2, meetings[own / 2], halves.data() + 2 * s);
    } else {
      for (int64_t s; (s = next++) < b.count;) encode_strip<STEP, PAIR>(b, start[s], b.strips[s]);
    }
  }
}

void encode(const Columns& b) {
  switch (b.step * 4 + b.pair) {
    case 2 * 4 + 1: return encode_strips<2, 1>(b);
    case 3 * 4 + 1: return encode_strips<3, 1>(b);
    case 4 * 4 + 1: return encode_strips<4, 1>(b);
    case 3 * 4 + 2: return encode_strips<3, 2>(b);
    case 4 * 4 + 2: return encode_strips<4, 2>(b);
    default: return encode_strips<5, 2>(b);
  }
}

}  // namespace
}  // namespace lopro
