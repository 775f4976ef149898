#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

extern "C" AOTITorchError aoti_torch_cpu_trellis_cpu_experts(
    AtenTensorHandle x, AtenTensorHandle ids, int64_t slots, AtenTensorHandle* perm, AtenTensorHandle* signs,
    int64_t block, int64_t skip, AtenTensorHandle* down, AtenTensorHandle* down_scale, AtenTensorHandle scales,
    AtenTensorHandle codes, AtenTensorHandle* up, AtenTensorHandle* up_scale, AtenTensorHandle* cells,
    AtenTensorHandle* core, double bits, int64_t columns, int64_t window, int64_t strip, int64_t act_bits,
    int64_t act_group, AtenTensorHandle* y);
