// The C function that AOTInductor's code calls for lopro::trellis_cpu_experts; register.cpp wraps it for eager mode.
#include "shim.h"

#include "cpu/experts.h"
#include "formats/trellis/cpu/weight.h"

using namespace lopro;

AOTITorchError aoti_torch_cpu_trellis_cpu_experts(AtenTensorHandle x, AtenTensorHandle ids, int64_t slots,
                                                  AtenTensorHandle* perm, AtenTensorHandle* signs, int64_t block,
                                                  int64_t skip, AtenTensorHandle* down, AtenTensorHandle* down_scale,
                                                  AtenTensorHandle scales, AtenTensorHandle codes,
                                                  AtenTensorHandle* up, AtenTensorHandle* up_scale,
                                                  AtenTensorHandle* cells, AtenTensorHandle* core, double bits,
                                                  int64_t columns, int64_t window, int64_t strip, int64_t act_bits,
                                                  int64_t act_group, AtenTensorHandle* y) {
  return guarded("trellis_cpu_experts", y, [&] {
    TrellisSite s = {};
    take_input(s, x, act_bits, act_group);
    Experts experts = take_experts(s, take_weight(s, true, scales, codes, bits, columns, window, strip), ids, slots);
    take_around(s, perm, signs, block, skip, nullptr, nullptr, nullptr, nullptr, nullptr);
    take_branches(s, experts, down, down_scale, up, up_scale, cells, core);
    return run_experts(s, experts, x);
  });
}
