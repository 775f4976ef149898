#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

extern "C" AOTITorchError aoti_torch_cpu_cpu_experts(
    AtenTensorHandle x, AtenTensorHandle ids, int64_t slots, AtenTensorHandle* perm, AtenTensorHandle* signs,
    int64_t block, int64_t skip, AtenTensorHandle* down, AtenTensorHandle* down_scale, AtenTensorHandle codes,
    AtenTensorHandle scales, AtenTensorHandle zeros, AtenTensorHandle* up, AtenTensorHandle* up_scale,
    AtenTensorHandle* cells, AtenTensorHandle* core, int64_t bits, int64_t group_size, int64_t act_bits,
    int64_t act_group, AtenTensorHandle* y);
