// Operands that every format's operator has.
#include "operands.h"

#include <algorithm>
#include <limits>
#include <type_traits>

namespace lopro {
namespace {

bool is_float(Type type) { return type == Type::f32 || type == Type::f16 || type == Type::bf16; }

int64_t elements(AtenTensorHandle tensor) {
  int64_t count;
  ok(aoti_torch_get_numel(tensor, &count));
  return count;
}

// Whether all of `count` indices lie in 0 .. count - 1.
template <class T>
bool inside(const void* indices, int64_t count) {
  using U = std::make_unsigned_t<T>;
  if (count - 1 > std::numeric_limits<T>::max()) return false;
  const U* values = static_cast<const U*>(indices);
  U largest = 0;
  for (int64_t j = 0; j < count; ++j) largest = std::max(largest, values[j]);
  return largest <= static_cast<U>(count - 1);
}

}  // namespace

const char*& error() {
  static thread_local const char* last = "";
  return last;
}

Type type_of(AtenTensorHandle tensor) {
  int32_t type;
  ok(aoti_torch_get_dtype(tensor, &type));
  if (type == aoti_torch_dtype_float32()) return Type::f32;
  if (type == aoti_torch_dtype_float16()) return Type::f16;
  if (type == aoti_torch_dtype_bfloat16()) return Type::bf16;
  if (type == aoti_torch_dtype_int8() || type == aoti_torch_dtype_uint8()) return Type::i8;
  if (type == aoti_torch_dtype_int16()) return Type::i16;
  if (type == aoti_torch_dtype_int32()) return Type::i32;
  return type == aoti_torch_dtype_int64() ? Type::i64 : Type::none;
}

int64_t dims(AtenTensorHandle tensor) {
  int64_t count;
  ok(aoti_torch_get_dim(tensor, &count));
  return count;
}

int64_t size(AtenTensorHandle tensor, int64_t dim) {
  int64_t result;
  ok(aoti_torch_get_size(tensor, dim, &result));
  return result;
}

const void* address(AtenTensorHandle* tensor, int64_t count, const char* what) {
  if (!tensor) return nullptr;
  bool contiguous;
  void* result;
  ok(aoti_torch_is_contiguous(*tensor, &contiguous));
  check(contiguous && elements(*tensor) == count, what);
  ok(aoti_torch_get_data_ptr(*tensor, &result));
  return result;
}

const void* moved(const void* address, Type type, int64_t count) {
  int64_t width = type == Type::i64 ? 8 : type == Type::f32 || type == Type::i32 ? 4 : type == Type::i8 ? 1 : 2;
  return address ? static_cast<const char*>(address) + count * width : nullptr;
}

void take_input(Site& s, AtenTensorHandle x, int64_t act_bits, int64_t act_group) {
  int64_t *sizes, *strides, rank = dims(x);
  ok(aoti_torch_get_sizes(x, &sizes));
  ok(aoti_torch_get_strides(x, &strides));
  check(rank > 0, "x has no dimension");
  s.type = type_of(x);
  check(is_float(s.type), "x is not float32, bfloat16 or float16");
  s.dims = rank - 1;
  s.sizes = sizes;
  s.strides = strides;
  s.in = sizes[rank - 1];
  s.column_stride = strides[rank - 1];
  s.tokens = 1;
  for (int64_t d = 0; d < s.dims; ++d) s.tokens *= sizes[d];
  void* address;
  ok(aoti_torch_get_data_ptr(x, &address));
  s.x = address;
  check(s.in > 0, "x has no columns");
  check(act_bits == 0 || act_bits == 4 || act_bits == 8, "act_bits is none of 0, 4, 8");
  check(act_group == 0 || act_group == -1 || act_group == 32 || act_group == 64 || act_group == 128,
        "act_group is none of 0, -1, 32, 64, 128");
  s.act_group = act_group;
  s.int8 = act_bits != 0;
  s.largest = act_bits == 4 ? 7.0f : 127.0f;
}

void take_around(Site& s, AtenTensorHandle* perm, AtenTensorHandle* signs, int64_t block, int64_t skip,
                 AtenTensorHandle* down, AtenTensorHandle* down_scale, AtenTensorHandle* bias, AtenTensorHandle* up,
                 AtenTensorHandle* up_scale) {
  s.block = block;
  s.skip = skip;
  check(block > 0 && (block & (block - 1)) == 0 && skip >= 0 && skip <= s.in && (s.in - skip) % block == 0,
        "block is not a power of two that divides the columns after skip");
  if (perm) {
    s.perm_type = type_of(*perm);
    check(s.perm_type == Type::i16 || s.perm_type == Type::i32, "perm is not int16 or int32");
    s.perm = data<void>(perm, s.in, "perm doesn't fit x");
    check(s.perm_type == Type::i16 ? inside<int16_t>(s.perm, s.in) : inside<int32_t>(s.perm, s.in),
          "perm holds what is no column of x");
  }
  s.signs = data<uint8_t>(signs, (s.in + 7) / 8, "signs doesn't fit x");
  if (down && up) {
    s.rank = size(*down, 0);
    if (up_scale) {
      s.parts = dims(*up_scale) == 2 ? size(*up_scale, 0) : 1;
      check(s.parts > 0 && s.out % s.parts == 0, "the parts of up_scale don't divide the rows of up");
    }
    take_factors(s, 1, 1, down, down_scale, up, up_scale);
  }
  if (bias) {
    s.bias_type = type_of(*bias);
    check(is_float(s.bias_type), "bias is not float32, bfloat16 or float16");
    s.bias = data<void>(bias, s.out, "bias doesn't fit scales");
  }
}

void take_factors(Site& s, int64_t downs, int64_t ups, AtenTensorHandle* down, AtenTensorHandle* down_scale,
                  AtenTensorHandle* up, AtenTensorHandle* up_scale) {
  s.down_type = type_of(*down);
  s.up_type = type_of(*up);
  check((s.down_type == Type::i8 || s.down_type == Type::f16) && (s.up_type == Type::i8 || s.up_type == Type::f16),
        "down or up is not int8 or float16");
  s.down = data<void>(down, downs * s.rank * s.in, "down doesn't fit x");
  s.up = data<void>(up, ups * s.out * s.rank, "up doesn't fit down and scales");
  s.down_scale_type = down_scale ? type_of(*down_scale) : Type::f16;
  s.up_scale_type = up_scale ? type_of(*up_scale) : Type::f16;
  check(is_scale(s.down_scale_type) && is_scale(s.up_scale_type), "down_scale or up_scale is not float16 or float32");
  s.down_scale = data<void>(down_scale, downs * s.rank, "down_scale doesn't fit down");
  s.up_scale = data<void>(up_scale, ups * s.parts * s.rank, "up_scale doesn't fit up");
}

AtenTensorHandle make_output(Site& s, AtenTensorHandle x) {
  constexpr int64_t most = 16;
  int64_t rank = s.dims + 1;
  check(rank <= most, "x has more than 16 dimensions");
  int64_t out_sizes[most], out_strides[most], stride = 1;
  for (int64_t d = rank - 1; d >= 0; --d) {
    out_sizes[d] = d == rank - 1 ? s.out : s.sizes[d];
    out_strides[d] = stride;
    stride *= out_sizes[d] > 1 ? out_sizes[d] : 1;
  }
  int32_t type;
  ok(aoti_torch_get_dtype(x, &type));
  AtenTensorHandle y;
  ok(aoti_torch_empty_strided(rank, out_sizes, out_strides, type, aoti_torch_device_type_cpu(), 0, &y));
  ok(aoti_torch_get_data_ptr(y, &s.y));
  return y;
}

}  // namespace lopro
