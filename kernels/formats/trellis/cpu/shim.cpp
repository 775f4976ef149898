// The C function that AOTInductor's code calls for lopro::trellis_cpu, and that register.cpp wraps for eager mode.
#include "shim.h"

#include "weight.h"

using namespace lopro;

AOTITorchError aoti_torch_cpu_trellis_cpu(AtenTensorHandle x, AtenTensorHandle* perm, AtenTensorHandle* signs,
                                          int64_t block, int64_t skip, AtenTensorHandle* down,
                                          AtenTensorHandle* down_scale, AtenTensorHandle scales,
                                          AtenTensorHandle codes, AtenTensorHandle* bias, AtenTensorHandle* up,
                                          AtenTensorHandle* up_scale, double bits, int64_t columns, int64_t window,
                                          int64_t strip, int64_t act_bits, int64_t act_group, AtenTensorHandle* y) {
  return guarded("trellis_cpu", y, [&] {
    TrellisSite s = {};
    take_input(s, x, act_bits, act_group);
    take_weight(s, false, scales, codes, bits, columns, window, strip);
    take_around(s, perm, signs, block, skip, down, down_scale, bias, up, up_scale);
    AtenTensorHandle result = make_output(s, x);
    if (s.tokens && s.out) run(Sites<TrellisSite>{&s, 1});
    return result;
  });
}
