// What operators for experts share: each expert that has rows becomes a site.
#pragma once

#include <memory>
#include <vector>

#include "operands.h"

namespace lopro {

struct Experts {
  int64_t count, slots;
  std::vector<int64_t> rows;    // of y, by their expert
  std::vector<int64_t> starts;  // (count + 1,), where the rows of each expert begin
  const int32_t* cells;         // (count, 2), or null
};

// The rows of each expert; x is known.
Experts take_experts(const Site& s, int64_t count, AtenTensorHandle ids, int64_t slots);
// Low-rank branches; x and `out` are known.
void take_branches(Site& s, Experts& experts, AtenTensorHandle* down, AtenTensorHandle* down_scale,
                   AtenTensorHandle* up, AtenTensorHandle* up_scale, AtenTensorHandle* cells, AtenTensorHandle* core);
// Moves to the rows and factors of an expert.
void move_rows(Site& s, const Experts& experts, int64_t expert);
// A new tensor for y, with a row for each of ids.
AtenTensorHandle make_rows(Site& s, const Experts& experts, AtenTensorHandle x);

// y of a site whose tensors are those of all experts. The format has move_weight(S&, expert).
template <class S>
AtenTensorHandle run_experts(S& s, const Experts& experts, AtenTensorHandle x) {
  std::vector<S> sites;
  std::unique_ptr<float[]> rotated;
  int64_t tokens = s.tokens;
  // A token goes to several experts, and is rotated once.
  if (experts.slots > 1 && (s.perm || s.block > 1)) rotated.reset(new float[tokens * s.in]);
  s.rotated = rotated.get();
  AtenTensorHandle y = make_rows(s, experts, x);
  for (int64_t expert = 0; expert < experts.count; ++expert) {
    if (experts.starts[expert] == experts.starts[expert + 1]) continue;
    sites.push_back(s);
    move_weight(sites.back(), expert);
    move_rows(sites.back(), experts, expert);
  }
  if (!sites.empty() && s.out)
    run(Sites<S>{sites.data(), static_cast<int64_t>(sites.size()), rotated.get(), tokens});
  return y;
}

}  // namespace lopro
