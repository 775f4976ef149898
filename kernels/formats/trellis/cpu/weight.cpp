#include "weight.h"

#include <cmath>

namespace lopro {
namespace {

int64_t words_of(const TrellisSite& s) {
  int64_t last = (s.out - (s.strips - 1) * s.strip + 31) / 32, words = (s.strips - 1) * (s.strip / 32) + last;
  return words * s.step * ((s.in + s.columns - 1) / s.columns);
}

}  // namespace

int64_t take_weight(TrellisSite& s, bool stacked, AtenTensorHandle scales, AtenTensorHandle codes, double bits,
                    int64_t columns, int64_t window, int64_t strip) {
  check(columns == 1 || columns == 2, "columns is neither 1 nor 2");
  check(window >= 12 && window <= 16, "window is not 12 to 16");
  check(strip == -1 || (strip > 0 && strip % 32 == 0), "strip is neither -1 nor a multiple of 32");
  // NaN and numbers beyond int64 fail the comparison before they are rounded.
  double step = bits * static_cast<double>(columns);
  check(columns == 1 ? step > 1.5 && step < 4.5 : step > 2.5 && step < 5.5, "bits is not one that columns allows");
  s.step = std::lrint(step);
  s.columns = columns;
  s.window = window;
  int64_t rank = stacked ? 2 : 1;
  check(dims(scales) == rank && dims(codes) == rank,
        stacked ? "scales or codes is not a matrix" : "scales or codes is not a vector");
  int64_t count = stacked ? size(scales, 0) : 1;
  s.out = size(scales, rank - 1);
  s.strips = strip == -1 ? 1 : (s.out + strip / 2) / strip;
  if (s.strips < 1) s.strips = 1;
  s.strip = s.strips == 1 ? s.out : strip;
  s.scales_type = type_of(scales);
  check(type_of(codes) == Type::i32 && is_scale(s.scales_type),
        "scales or codes is of another type than float16 or float32, int32");
  s.scales = data<void>(&scales, count * s.out, "scales is not contiguous");
  s.codes = data<uint8_t>(&codes, count * words_of(s), "codes doesn't fit x and scales");
  return count;
}

void move_weight(TrellisSite& s, int64_t expert) {
  s.scales = moved(s.scales, s.scales_type, expert * s.out);
  s.codes += expert * words_of(s) * 4;
}

}  // namespace lopro
