// Registers the kernel of lopro::cpu_site for CPU tensors; part of the shared library only.
#include "cpu/register.h"
#include "shim.h"

namespace {

Tensor cpu_site(Tensor x, Optional perm, Optional signs, int64_t block, int64_t skip, Optional down,
                Optional down_scale, Tensor codes, Tensor scales, Tensor zeros, Optional bias, Optional up,
                Optional up_scale, int64_t bits, int64_t group_size, int64_t act_bits, int64_t act_group) {
  AtenTensorHandle y;
  AOTITorchError code = aoti_torch_cpu_cpu_site(
      x.get(), Handle(perm).get(), Handle(signs).get(), block, skip, Handle(down).get(), Handle(down_scale).get(),
      codes.get(), scales.get(), zeros.get(), Handle(bias).get(), Handle(up).get(), Handle(up_scale).get(), bits,
      group_size, act_bits, act_group, &y);
  return result(code, y, "lopro::cpu_site");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lopro, CPU, m) { m.impl("cpu_site", TORCH_BOX(&cpu_site)); }
