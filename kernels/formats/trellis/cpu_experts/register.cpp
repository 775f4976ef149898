// Registers the kernel of lopro::trellis_cpu_experts for CPU tensors; part of the shared library only.
#include "cpu/register.h"
#include "shim.h"

namespace {

Tensor trellis_cpu_experts(Tensor x, Tensor ids, int64_t slots, Optional perm, Optional signs, int64_t block,
                           int64_t skip, Optional down, Optional down_scale, Tensor scales, Tensor codes, Optional up,
                           Optional up_scale, Optional cells, Optional core, double bits, int64_t columns,
                           int64_t window, int64_t strip, int64_t act_bits, int64_t act_group) {
  AtenTensorHandle y;
  AOTITorchError code = aoti_torch_cpu_trellis_cpu_experts(
      x.get(), ids.get(), slots, Handle(perm).get(), Handle(signs).get(), block, skip, Handle(down).get(),
      Handle(down_scale).get(), scales.get(), codes.get(), Handle(up).get(), Handle(up_scale).get(),
      Handle(cells).get(), Handle(core).get(), bits, columns, window, strip, act_bits, act_group, &y);
  return result(code, y, "lopro::trellis_cpu_experts");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lopro, CPU, m) { m.impl("trellis_cpu_experts", TORCH_BOX(&trellis_cpu_experts)); }
