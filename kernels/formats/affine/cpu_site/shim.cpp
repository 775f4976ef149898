// The C function that AOTInductor's code calls for lopro::cpu_site, and that register.cpp wraps for eager mode.
#include "shim.h"

#include "weight.h"

using namespace lopro;

AOTITorchError aoti_torch_cpu_cpu_site(AtenTensorHandle x, AtenTensorHandle* perm, AtenTensorHandle* signs,
                                       int64_t block, int64_t skip, AtenTensorHandle* down,
                                       AtenTensorHandle* down_scale, AtenTensorHandle codes, AtenTensorHandle scales,
                                       AtenTensorHandle zeros, AtenTensorHandle* bias, AtenTensorHandle* up,
                                       AtenTensorHandle* up_scale, int64_t bits, int64_t group_size,
                                       int64_t act_bits, int64_t act_group, AtenTensorHandle* y) {
  return guarded("cpu_site", y, [&] {
    AffineSite s = {};
    take_input(s, x, act_bits, act_group);
    take_weight(s, false, codes, scales, zeros, bits, group_size);
    take_around(s, perm, signs, block, skip, down, down_scale, bias, up, up_scale);
    AtenTensorHandle result = make_output(s, x);
    if (s.tokens && s.out) run(Sites<AffineSite>{&s, 1});
    return result;
  });
}
