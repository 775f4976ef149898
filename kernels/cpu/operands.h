// Reading an operator's operands, from the C function that AOTInductor's code calls.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdio>

#include "site.h"

namespace lopro {

// Reason why the last call on this thread failed.
const char*& error();

// Raised to leave the call; `what` says which operand is wrong and how.
struct Refused {
  const char* what;
};

inline void check(bool fine, const char* what) {
  if (!fine) throw Refused{what};
}

inline void ok(AOTITorchError error) { check(error == AOTI_TORCH_SUCCESS, "a tensor could not be read or made"); }

Type type_of(AtenTensorHandle tensor);
int64_t dims(AtenTensorHandle tensor);
int64_t size(AtenTensorHandle tensor, int64_t dim);
// Address of a contiguous tensor of `count` elements, or null for none.
const void* address(AtenTensorHandle* tensor, int64_t count, const char* what);

template <class T>
const T* data(AtenTensorHandle* tensor, int64_t count, const char* what) {
  return static_cast<const T*>(address(tensor, count, what));
}

// Address of the element `count` elements later.
const void* moved(const void* address, Type type, int64_t count);

inline bool is_scale(Type type) { return type == Type::f16 || type == Type::f32; }

// Sizes, strides and address of x, and how it is rounded.
void take_input(Site& s, AtenTensorHandle x, int64_t act_bits, int64_t act_group);
// Rotation, low-rank branch and bias; x and `out` are known.
void take_around(Site& s, AtenTensorHandle* perm, AtenTensorHandle* signs, int64_t block, int64_t skip,
                 AtenTensorHandle* down, AtenTensorHandle* down_scale, AtenTensorHandle* bias, AtenTensorHandle* up,
                 AtenTensorHandle* up_scale);
// Factors of the low-rank branch, as many of down and of up, one after another; rank and parts are known.
void take_factors(Site& s, int64_t downs, int64_t ups, AtenTensorHandle* down, AtenTensorHandle* down_scale,
                  AtenTensorHandle* up, AtenTensorHandle* up_scale);
// A new tensor for y.
AtenTensorHandle make_output(Site& s, AtenTensorHandle x);

// Runs `body`, which gives y, and turns a refusal into an error code.
template <class Body>
AOTITorchError guarded(const char* name, AtenTensorHandle* y, Body body) {
  try {
    *y = body();
    return AOTI_TORCH_SUCCESS;
  } catch (const Refused& refused) {
    error() = refused.what;
    std::fprintf(stderr, "lopro::%s: %s\n", name, refused.what);
    return AOTI_TORCH_FAILURE;
  }
}

}  // namespace lopro
