// The C function that AOTInductor's code calls for lopro::cpu_site, and that register.cpp wraps for eager mode.
#include "shim.h"

#include <cstdio>

#include "site.h"

namespace lopro {
namespace {

// Raised to leave the call; `what` says which operand is wrong and how.
struct Refused {
  const char* what;
};

void check(bool fine, const char* what) {
  if (!fine) throw Refused{what};
}

void ok(AOTITorchError error) { check(error == AOTI_TORCH_SUCCESS, "a tensor could not be read or made"); }

Type type_of(AtenTensorHandle tensor) {
  int32_t type;
  ok(aoti_torch_get_dtype(tensor, &type));
  if (type == aoti_torch_dtype_float32()) return Type::f32;
  if (type == aoti_torch_dtype_float16()) return Type::f16;
  if (type == aoti_torch_dtype_bfloat16()) return Type::bf16;
  if (type == aoti_torch_dtype_int8() || type == aoti_torch_dtype_uint8()) return Type::i8;
  if (type == aoti_torch_dtype_int16()) return Type::i16;
  return type == aoti_torch_dtype_int32() ? Type::i32 : Type::none;
}

bool is_float(Type type) { return type == Type::f32 || type == Type::f16 || type == Type::bf16; }

bool is_scale(Type type) { return type == Type::f16 || type == Type::f32; }

int64_t elements(AtenTensorHandle tensor) {
  int64_t count;
  ok(aoti_torch_get_numel(tensor, &count));
  return count;
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

// Address of a contiguous tensor of `count` elements, or null for none.
template <class T>
const T* data(AtenTensorHandle* tensor, int64_t count, const char* what) {
  if (!tensor) return nullptr;
  bool contiguous;
  void* result;
  ok(aoti_torch_is_contiguous(*tensor, &contiguous));
  check(contiguous && elements(*tensor) == count, what);
  ok(aoti_torch_get_data_ptr(*tensor, &result));
  return static_cast<const T*>(result);
}

AtenTensorHandle call(AtenTensorHandle x, AtenTensorHandle* perm, AtenTensorHandle* signs, int64_t block, int64_t skip,
                      AtenTensorHandle* down, AtenTensorHandle* down_scale, AtenTensorHandle codes,
                      AtenTensorHandle scales, AtenTensorHandle zeros, AtenTensorHandle* bias, AtenTensorHandle* up,
                      AtenTensorHandle* up_scale, int64_t bits, int64_t group_size, int64_t act_bits) {
  Site s = {};
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

  check(bits == 2 || bits == 3 || bits == 4 || bits == 8, "bits is not 2, 3, 4 or 8");
  check(group_size == -1 || (group_size > 0 && group_size % 32 == 0), "group_size is neither -1 nor a multiple of 32");
  check(act_bits == 0 || act_bits == 8, "act_bits is neither 0 nor 8");
  check(s.in > 0 && dims(scales) == 2, "x has no columns, or scales is not a matrix");
  s.bits = bits;
  s.int8 = act_bits == 8;
  s.out = size(scales, 0);
  s.groups = group_size == -1 ? 1 : (s.in + group_size - 1) / group_size;
  s.group = group_size == -1 ? s.in : group_size;
  s.zero_words = (s.out * s.groups + 31) / 32 * bits;
  s.scales_type = type_of(scales);
  check(type_of(codes) == Type::i32 && is_scale(s.scales_type) && type_of(zeros) == Type::i32,
        "codes, scales or zeros is of another type than int32, float16 or float32, int32");
  s.codes = data<uint32_t>(&codes, s.out * ((s.in + 31) / 32 * bits), "codes doesn't fit x and scales");
  s.scales = data<void>(&scales, s.out * s.groups, "scales doesn't fit x and group_size");
  s.zeros = data<uint32_t>(&zeros, s.zero_words, "zeros doesn't fit scales");

  s.block = block;
  s.skip = skip;
  check(block > 0 && (block & (block - 1)) == 0 && skip >= 0 && skip <= s.in && (s.in - skip) % block == 0,
        "block is not a power of two that divides the columns after skip");
  if (perm) {
    s.perm_type = type_of(*perm);
    check(s.perm_type == Type::i16 || s.perm_type == Type::i32, "perm is not int16 or int32");
    s.perm = data<void>(perm, s.in, "perm doesn't fit x");
  }
  s.signs = data<uint8_t>(signs, (s.in + 7) / 8, "signs doesn't fit x");
  if (down && up) {
    s.rank = size(*down, 0);
    s.down_type = type_of(*down);
    s.up_type = type_of(*up);
    check((s.down_type == Type::i8 || s.down_type == Type::f16) && (s.up_type == Type::i8 || s.up_type == Type::f16),
          "down or up is not int8 or float16");
    s.down = data<void>(down, s.rank * s.in, "down doesn't fit x");
    s.up = data<void>(up, s.out * s.rank, "up doesn't fit down and scales");
    s.down_scale_type = down_scale ? type_of(*down_scale) : Type::f16;
    s.up_scale_type = up_scale ? type_of(*up_scale) : Type::f16;
    check(is_scale(s.down_scale_type) && is_scale(s.up_scale_type), "down_scale or up_scale is not float16 or float32");
    s.down_scale = data<void>(down_scale, s.rank, "down_scale doesn't fit down");
    if (up_scale) {
      s.parts = dims(*up_scale) == 2 ? size(*up_scale, 0) : 1;
      s.up_scale = data<void>(up_scale, s.parts * s.rank, "up_scale doesn't fit up");
      check(s.parts > 0 && s.out % s.parts == 0, "the parts of up_scale don't divide the rows of up");
    }
  }
  if (bias) {
    s.bias_type = type_of(*bias);
    check(is_float(s.bias_type), "bias is not float32, bfloat16 or float16");
    s.bias = data<void>(bias, s.out, "bias doesn't fit scales");
  }

  constexpr int64_t most = 16;
  check(rank <= most, "x has more than 16 dimensions");
  int64_t out_sizes[most], out_strides[most], stride = 1;
  for (int64_t d = rank - 1; d >= 0; --d) {
    out_sizes[d] = d == rank - 1 ? s.out : sizes[d];
    out_strides[d] = stride;
    stride *= out_sizes[d] > 1 ? out_sizes[d] : 1;
  }
  int32_t type;
  ok(aoti_torch_get_dtype(x, &type));
  AtenTensorHandle y;
  ok(aoti_torch_empty_strided(rank, out_sizes, out_strides, type, aoti_torch_device_type_cpu(), 0, &y));
  ok(aoti_torch_get_data_ptr(y, &address));
  s.y = address;
  if (s.tokens && s.out) run(s);
  return y;
}

thread_local const char* last_error = "";

}  // namespace

const char* error() { return last_error; }

}  // namespace lopro

AOTITorchError aoti_torch_cpu_cpu_site(AtenTensorHandle x, AtenTensorHandle* perm, AtenTensorHandle* signs,
                                       int64_t block, int64_t skip, AtenTensorHandle* down,
                                       AtenTensorHandle* down_scale, AtenTensorHandle codes, AtenTensorHandle scales,
                                       AtenTensorHandle zeros, AtenTensorHandle* bias, AtenTensorHandle* up,
                                       AtenTensorHandle* up_scale, int64_t bits, int64_t group_size, int64_t act_bits,
                                       AtenTensorHandle* y) {
  try {
    *y = lopro::call(x, perm, signs, block, skip, down, down_scale, codes, scales, zeros, bias, up, up_scale, bits,
                     group_size, act_bits);
    return AOTI_TORCH_SUCCESS;
  } catch (const lopro::Refused& refused) {
    lopro::last_error = refused.what;
    std::fprintf(stderr, "lopro::cpu_site: %s\n", refused.what);
    return AOTI_TORCH_FAILURE;
  }
}
