// Registers the kernel of lopro::cpu_site for CPU tensors; part of the shared library only.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "shim.h"
#include "site.h"

namespace {

using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

struct Handle {
  AtenTensorHandle value = nullptr;
  bool given;
  explicit Handle(const Optional& tensor) : given(tensor.has_value()) {
    if (given) value = tensor->get();
  }
  AtenTensorHandle* get() { return given ? &value : nullptr; }
};

Tensor cpu_site(Tensor x, Optional perm, Optional signs, int64_t block, int64_t skip, Optional down,
                Optional down_scale, Tensor codes, Tensor scales, Tensor zeros, Optional bias, Optional up,
                Optional up_scale, int64_t bits, int64_t group_size, int64_t act_bits) {
  AtenTensorHandle y;
  AOTITorchError error = aoti_torch_cpu_cpu_site(
      x.get(), Handle(perm).get(), Handle(signs).get(), block, skip, Handle(down).get(), Handle(down_scale).get(),
      codes.get(), scales.get(), zeros.get(), Handle(bias).get(), Handle(up).get(), Handle(up_scale).get(), bits,
      group_size, act_bits, &y);
  if (error != AOTI_TORCH_SUCCESS) throw std::invalid_argument(std::string("lopro::cpu_site: ") + lopro::error());
  return Tensor(y);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lopro, CPU, m) { m.impl("cpu_site", TORCH_BOX(&cpu_site)); }

extern "C" __attribute__((visibility("default"))) const char* lopro_cpu_site_path() { return lopro::path(); }
extern "C" __attribute__((visibility("default"))) bool lopro_cpu_site_set_path(const char* name) {
  return lopro::set_path(name);
}
