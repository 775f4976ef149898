// Sizes that follow from a site.
#pragma once

#include "cpu/common.h"
#include "site.h"

namespace lopro {
namespace {

template <int BITS>
struct Codes {
  static constexpr int width = BITS == 3 ? 2 : BITS;
  static constexpr int fields = 8 / width;
  static constexpr int lane = 4 * fields;
  static constexpr int chunk = 16 * lane;
};

struct Plan : Sizes {
  int64_t chunks;             // of a row; the last one may be short
  int64_t row_bytes, plane;   // of a row, and of its first bit plane
  bool by_group;              // scales of a row are kept by group of 2^log_ratio blocks, else by block
  int log_ratio;
  int64_t scales;             // kept, of a row
  int64_t stride;             // of a row in `weigh`'s results: blocks, without gaps or padded
  int64_t together;           // blocks of a panel's columns that share scales and steps
};

inline Plan make_plan(const AffineSite& s) {
  int log_block = log_block_for(s);
  while (s.groups > 1 && s.group % (int64_t{1} << log_block)) --log_block;
  Plan p = {make_sizes(s, log_block)};
  int64_t padded = round_up(s.in, 32), width = s.bits == 3 ? 2 : s.bits;
  p.row_bytes = padded / 8 * s.bits;
  p.plane = padded / 8 * width;
  p.chunks = ceil_div(p.plane, 64);
  p.log_ratio = 0;
  while (s.groups > 1 && p.block << p.log_ratio < s.group) ++p.log_ratio;
  p.by_group = s.groups > 1 && p.block << p.log_ratio == s.group;
  if (!p.by_group) p.log_ratio = 0;
  p.scales = p.by_group ? s.groups : p.blocks;
  p.stride = p.log_ratio ? p.padded_blocks : p.blocks;
  p.together = s.groups == 1 && s.act_group == -1 ? PANEL_COLUMNS / p.block : 1;
  return p;
}

inline int64_t group_of(const AffineSite& s, const Plan& p, int64_t block) {
  return s.groups == 1 ? 0 : (block << p.log_block) / s.group;
}

}  // namespace
}  // namespace lopro
