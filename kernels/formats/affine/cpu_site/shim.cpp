// The C function that AOTInductor's code calls for lopro::cpu_site, and that register.cpp wraps for eager mode.
#include "shim.h"

#include "cpu/operands.h"
#include "site.h"

using namespace lopro;

AOTITorchError aoti_torch_cpu_cpu_site(AtenTensorHandle x, AtenTensorHandle* perm, AtenTensorHandle* signs,
                                       int64_t block, int64_t skip, AtenTensorHandle* down,
                                       AtenTensorHandle* down_scale, AtenTensorHandle codes, AtenTensorHandle scales,
                                       AtenTensorHandle zeros, AtenTensorHandle* bias, AtenTensorHandle* up,
                                       AtenTensorHandle* up_scale, int64_t bits, int64_t group_size, int64_t act_bits,
                                       AtenTensorHandle* y) {
  return guarded("cpu_site", y, [&] {
    AffineSite s = {};
    take_input(s, x, act_bits);
    check(bits == 2 || bits == 3 || bits == 4 || bits == 8, "bits is not 2, 3, 4 or 8");
    check(group_size == -1 || (group_size > 0 && group_size % 32 == 0),
          "group_size is neither -1 nor a multiple of 32");
    check(dims(scales) == 2, "scales is not a matrix");
    s.bits = bits;
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
    take_around(s, perm, signs, block, skip, down, down_scale, bias, up, up_scale);
    AtenTensorHandle result = make_output(s, x);
    if (s.tokens && s.out) run(s);
    return result;
  });
}
