#include "weight.h"

namespace lopro {
namespace {

int64_t words_of(const AffineSite& s) { return s.out * ((s.in + 31) / 32 * s.bits); }

}  // namespace

int64_t take_weight(AffineSite& s, bool stacked, AtenTensorHandle codes, AtenTensorHandle scales,
                    AtenTensorHandle zeros, int64_t bits, int64_t group_size) {
  check(bits == 2 || bits == 3 || bits == 4 || bits == 8, "bits is not 2, 3, 4 or 8");
  check(group_size == -1 || (group_size > 0 && group_size % 32 == 0), "group_size is neither -1 nor a multiple of 32");
  check(dims(scales) == (stacked ? 3 : 2), stacked ? "scales has not 3 dimensions" : "scales is not a matrix");
  int64_t count = stacked ? size(scales, 0) : 1;
  s.bits = bits;
  s.out = size(scales, stacked ? 1 : 0);
  s.groups = group_size == -1 ? 1 : (s.in + group_size - 1) / group_size;
  s.group = group_size == -1 ? s.in : group_size;
  s.zero_words = (s.out * s.groups + 31) / 32 * bits;
  s.scales_type = type_of(scales);
  check(type_of(codes) == Type::i32 && is_scale(s.scales_type) && type_of(zeros) == Type::i32,
        "codes, scales or zeros is of another type than int32, float16 or float32, int32");
  s.codes = data<uint32_t>(&codes, count * words_of(s), "codes doesn't fit x and scales");
  s.scales = data<void>(&scales, count * s.out * s.groups, "scales doesn't fit x and group_size");
  s.zeros = data<uint32_t>(&zeros, count * s.zero_words, "zeros doesn't fit scales");
  return count;
}

void move_weight(AffineSite& s, int64_t expert) {
  s.codes += expert * words_of(s);
  s.scales = moved(s.scales, s.scales_type, expert * s.out * s.groups);
  s.zeros += expert * s.zero_words;
}

}  // namespace lopro
