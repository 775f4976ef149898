// The C function that AOTInductor's code calls for lopro::cpu_experts, and that register.cpp wraps for eager mode.
#include "shim.h"

#include "cpu/experts.h"
#include "formats/affine/cpu_site/weight.h"

using namespace lopro;

AOTITorchError aoti_torch_cpu_cpu_experts(AtenTensorHandle x, AtenTensorHandle ids, int64_t slots,
                                          AtenTensorHandle* perm, AtenTensorHandle* signs, int64_t block,
                                          int64_t skip, AtenTensorHandle* down, AtenTensorHandle* down_scale,
                                          AtenTensorHandle codes, AtenTensorHandle scales, AtenTensorHandle zeros,
                                          AtenTensorHandle* up, AtenTensorHandle* up_scale, AtenTensorHandle* cells,
                                          AtenTensorHandle* core, int64_t bits, int64_t group_size, int64_t act_bits,
                                          int64_t act_group, AtenTensorHandle* y) {
  return guarded("cpu_experts", y, [&] {
    AffineSite s = {};
    take_input(s, x, act_bits, act_group);
    Experts experts = take_experts(s, take_weight(s, true, codes, scales, zeros, bits, group_size), ids, slots);
    take_around(s, perm, signs, block, skip, nullptr, nullptr, nullptr, nullptr, nullptr);
    take_branches(s, experts, down, down_scale, up, up_scale, cells, core);
    return run_experts(s, experts, x);
  });
}
