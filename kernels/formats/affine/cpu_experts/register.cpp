// Registers the kernel of lopro::cpu_experts for CPU tensors; part of the shared library only.
#include "cpu/register.h"
#include "shim.h"

namespace {

Tensor cpu_experts(Tensor x, Tensor ids, int64_t slots, Optional perm, Optional signs, int64_t block, int64_t skip,
                   Optional down, Optional down_scale, Tensor codes, Tensor scales, Tensor zeros, Optional up,
                   Optional up_scale, Optional cells, Optional core, int64_t bits, int64_t group_size,
                   int64_t act_bits, int64_t act_group) {
  AtenTensorHandle y;
  AOTITorchError code = aoti_torch_cpu_cpu_experts(
      x.get(), ids.get(), slots, Handle(perm).get(), Handle(signs).get(), block, skip, Handle(down).get(),
      Handle(down_scale).get(), codes.get(), scales.get(), zeros.get(), Handle(up).get(), Handle(up_scale).get(),
      Handle(cells).get(), Handle(core).get(), bits, group_size, act_bits, act_group, &y);
  return result(code, y, "lopro::cpu_experts");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lopro, CPU, m) { m.impl("cpu_experts", TORCH_BOX(&cpu_experts)); }
