#include "experts.h"

namespace lopro {

Experts take_experts(const Site& s, int64_t count, AtenTensorHandle ids, int64_t slots) {
  check(s.dims == 1, "x is not a matrix");
  check(dims(ids) == 1 && slots > 0 && size(ids, 0) % slots == 0 && size(ids, 0) / slots == s.tokens,
        "ids doesn't hold as many experts as x has tokens, times slots");
  Type type = type_of(ids);
  check(type == Type::i64 || type == Type::i32, "ids is not int64 or int32");
  int64_t rows = size(ids, 0), *strides;
  void* address;
  ok(aoti_torch_get_strides(ids, &strides));
  ok(aoti_torch_get_data_ptr(ids, &address));
  auto expert_of = [&](int64_t row) -> int64_t {
    int64_t at = row * strides[0];
    return type == Type::i64 ? static_cast<const int64_t*>(address)[at] : static_cast<const int32_t*>(address)[at];
  };
  // An id is read once: were it written meanwhile, it would still be one that was checked.
  std::vector<int64_t> experts(rows);
  Experts result = {count, slots, std::vector<int64_t>(rows), std::vector<int64_t>(count + 1)};
  for (int64_t row = 0; row < rows; ++row) {
    experts[row] = expert_of(row);
    check(experts[row] >= 0 && experts[row] < count, "ids holds what is no expert");
    ++result.starts[experts[row] + 1];
  }
  for (int64_t expert = 0; expert < count; ++expert) result.starts[expert + 1] += result.starts[expert];
  std::vector<int64_t> next(result.starts);
  for (int64_t row = 0; row < rows; ++row) result.rows[next[experts[row]]++] = row;
  return result;
}

void take_branches(Site& s, Experts& experts, AtenTensorHandle* down, AtenTensorHandle* down_scale,
                   AtenTensorHandle* up, AtenTensorHandle* up_scale, AtenTensorHandle* cells, AtenTensorHandle* core) {
  if (!down || !up) return;
  check(dims(*down) == 2 && dims(*up) == 3, "down has not 2 dimensions, or up not 3");
  int64_t columns = size(*up, 0), rank = size(*up, 2);
  if (!rank) return;
  check(size(*down, 0) % rank == 0, "the rank of up doesn't divide the rows of down");
  int64_t rows = size(*down, 0) / rank;
  s.rank = rank;
  s.parts = up_scale ? 1 : 0;
  take_factors(s, rows, columns, down, down_scale, up, up_scale);
  if (cells) {
    check(type_of(*cells) == Type::i32, "cells is not int32");
    experts.cells = data<int32_t>(cells, experts.count * 2, "cells has not two numbers for each expert");
    for (int64_t i = 0; i < experts.count; ++i) {
      int64_t row = experts.cells[2 * i], column = experts.cells[2 * i + 1];
      check(row >= 0 && row < rows && column >= 0 && column < columns, "cells holds what is no row or column");
    }
  } else {
    check(rows == experts.count && columns == experts.count, "down or up is not of as many experts as scales");
  }
  if (core) {
    check(type_of(*core) == Type::f16, "core is not float16");
    s.core = data<uint16_t>(core, experts.count * rank * rank, "core doesn't fit up and scales");
  }
}

void move_rows(Site& s, const Experts& experts, int64_t expert) {
  s.rows = experts.rows.data() + experts.starts[expert];
  s.tokens = experts.starts[expert + 1] - experts.starts[expert];
  s.slots = experts.slots;
  if (!s.rank) return;
  int64_t row = experts.cells ? experts.cells[2 * expert] : expert;
  int64_t column = experts.cells ? experts.cells[2 * expert + 1] : expert;
  s.down = moved(s.down, s.down_type, row * s.rank * s.in);
  s.down_scale = moved(s.down_scale, s.down_scale_type, row * s.rank);
  s.up = moved(s.up, s.up_type, column * s.out * s.rank);
  s.up_scale = moved(s.up_scale, s.up_scale_type, column * s.rank);
  if (s.core) s.core += expert * s.rank * s.rank;
}

AtenTensorHandle make_rows(Site& s, const Experts& experts, AtenTensorHandle x) {
  Site shaped = s;
  int64_t rows = static_cast<int64_t>(experts.rows.size());
  shaped.sizes = &rows;
  AtenTensorHandle y = make_output(shaped, x);
  s.y = shaped.y;
  return y;
}

}  // namespace lopro
