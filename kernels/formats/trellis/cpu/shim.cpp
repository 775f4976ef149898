// The C function that AOTInductor's code calls for lopro::trellis_cpu, and that register.cpp wraps for eager mode.
#include "shim.h"

#include <cmath>

#include "cpu/operands.h"
#include "site.h"

using namespace lopro;

AOTITorchError aoti_torch_cpu_trellis_cpu(AtenTensorHandle x, AtenTensorHandle* perm, AtenTensorHandle* signs,
                                          int64_t block, int64_t skip, AtenTensorHandle* down,
                                          AtenTensorHandle* down_scale, AtenTensorHandle scales, AtenTensorHandle codes,
                                          AtenTensorHandle* bias, AtenTensorHandle* up, AtenTensorHandle* up_scale,
                                          double bits, int64_t columns, int64_t window, int64_t strip, int64_t act_bits,
                                          AtenTensorHandle* y) {
  return guarded("trellis_cpu", y, [&] {
    TrellisSite s = {};
    take_input(s, x, act_bits);
    check(columns == 1 || columns == 2, "columns is neither 1 nor 2");
    check(window >= 12 && window <= 16, "window is not 12 to 16");
    check(strip == -1 || (strip > 0 && strip % 32 == 0), "strip is neither -1 nor a multiple of 32");
    // NaN and numbers beyond int64 fail the comparison before they are rounded.
    double step = bits * static_cast<double>(columns);
    check(columns == 1 ? step > 1.5 && step < 4.5 : step > 2.5 && step < 5.5, "bits is not one that columns allows");
    s.step = std::lrint(step);
    s.columns = columns;
    s.window = window;
    check(dims(scales) == 1 && dims(codes) == 1, "scales or codes is not a vector");
    s.out = size(scales, 0);
    s.strips = strip == -1 ? 1 : (s.out + strip / 2) / strip;
    if (s.strips < 1) s.strips = 1;
    s.strip = s.strips == 1 ? s.out : strip;
    int64_t last = (s.out - (s.strips - 1) * s.strip + 31) / 32, words = (s.strips - 1) * (s.strip / 32) + last;
    s.scales_type = type_of(scales);
    check(type_of(codes) == Type::i32 && is_scale(s.scales_type),
          "scales or codes is of another type than float16 or float32, int32");
    s.scales = data<void>(&scales, s.out, "scales is not contiguous");
    words *= s.step * ((s.in + columns - 1) / columns);
    s.codes = data<uint8_t>(&codes, words, "codes doesn't fit x and scales");
    take_around(s, perm, signs, block, skip, down, down_scale, bias, up, up_scale);
    AtenTensorHandle result = make_output(s, x);
    if (s.tokens && s.out) run(s);
    return result;
  });
}
