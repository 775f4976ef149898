#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

extern "C" AOTITorchError aoti_torch_cpu_cpu_site(
    AtenTensorHandle x, AtenTensorHandle* perm, AtenTensorHandle* signs, int64_t block, int64_t skip,
    AtenTensorHandle* down, AtenTensorHandle* down_scale, AtenTensorHandle codes, AtenTensorHandle scales,
    AtenTensorHandle zeros, AtenTensorHandle* bias, AtenTensorHandle* up, AtenTensorHandle* up_scale, int64_t bits,
    int64_t group_size, int64_t act_bits, int64_t act_group, AtenTensorHandle* y);
