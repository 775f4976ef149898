// What registering a kernel with torch takes, beside the C function that it wraps.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "operands.h"

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

inline Tensor result(AOTITorchError code, AtenTensorHandle y, const char* name) {
  if (code != AOTI_TORCH_SUCCESS) throw std::invalid_argument(std::string(name) + ": " + lopro::error());
  return Tensor(y);
}

}  // namespace
