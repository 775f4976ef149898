// The loops of every path. A tile of rows goes through a whole block of columns before the next tile.
#pragma once

#include <vector>

#include "columns.h"
#include "cpu/lanes.h"

namespace lopro {
namespace {

constexpr int64_t TILE = 32;
constexpr int PARTS = TILE / LANES;
// Bounds of a scale, and its bits below fp16's significand: those of grid.py and scales.py.
constexpr float MIN_SCALE = 0x1p-60f, MAX_SCALE = 65504.0f;
constexpr int CUT = 13;

// One number for each row of a tile.
struct Tile {
  Floats part[PARTS];
};

#define LOPRO_EACH for (int i = 0; i < PARTS; ++i)

__attribute__((always_inline)) inline Tile tile(const float* p) {
  Tile result;
  LOPRO_EACH result.part[i] = load<Floats>(p + i * LANES);
  return result;
}

__attribute__((always_inline)) inline void put(float* p, const Tile& t) {
  LOPRO_EACH store(p + i * LANES, t.part[i]);
}

inline Floats least(Floats a, Floats b) { return a < b ? a : b; }
inline Floats most(Floats a, Floats b) { return a > b ? a : b; }
inline Floats clamped(Floats x, float low, float high) { return least(most(x, low - Floats{}), high - Floats{}); }

// Rounded half to even; |x| < 2^22.
inline Floats rounded(Floats x) {
  constexpr float shift = 12582912.0f;
  return (x + shift) - shift;
}

inline Floats rounded_scale(Floats x) {
  Ints bits = (Ints)x;
  return (Floats)((bits + ((1 << (CUT - 1)) - 1) + ((bits >> CUT) & 1)) & -(1 << CUT));
}

// Rows of a matrix that a tile has, as columns of TILE floats; missing rows hold `fill`.
struct Rows {
  int64_t first, count, stride;
  Rows(int64_t index, int64_t rows) : first(index * TILE), count(rows - first < TILE ? rows - first : TILE), stride(rows) {}
  template <class T>
  void read(const T* matrix, int64_t columns, float* to, float fill = 0) const {
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t i = 0; i < TILE; ++i)
        to[j * TILE + i] = i < count ? static_cast<float>(matrix[j * stride + first + i]) : fill;
  }
  template <class T>
  void write(T* matrix, int64_t columns, const float* from) const {
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t i = 0; i < count; ++i) matrix[j * stride + first + i] = static_cast<T>(from[j * TILE + i]);
  }
};

// sum + the sum over k of factors[k * stride] * values[k], each a tile; in two sums, for the adder's latency.
__attribute__((always_inline)) inline Tile gathered(Tile sum, const float* factors, int64_t stride, const float* values,
                                                    int64_t count) {
  Tile other = {};
  int64_t k = 0;
  for (; k + 1 < count; k += 2) {
    const Tile even = tile(values + k * TILE), odd = tile(values + (k + 1) * TILE);
    LOPRO_EACH sum.part[i] += factors[k * stride] * even.part[i];
    LOPRO_EACH other.part[i] += factors[(k + 1) * stride] * odd.part[i];
  }
  if (k < count) {
    const Tile last = tile(values + k * TILE);
    LOPRO_EACH sum.part[i] += factors[k * stride] * last.part[i];
  }
  LOPRO_EACH sum.part[i] += other.part[i];
  return sum;
}

void fit_tile(const GridFit& f, const Rows& rows, std::vector<float>& memory) {
  memory.resize((f.width + 2) * TILE);
  float *block = memory.data(), *scales = block + f.width * TILE, *zeros = scales + TILE;
  rows.read(f.block, f.width, block);
  const float top = static_cast<float>(f.top);
  for (int part = 0; part < PARTS; ++part) {
    const float* column = block + part * LANES;
    Floats low = {}, high = {};
    for (int64_t j = 0; j < f.width; ++j) {
      const Floats x = load<Floats>(column + j * TILE);
      low = least(low, x);
      high = most(high, x);
    }
    Floats best_scale = {}, best_zero = {}, best = {};
    for (int64_t step = 0; step <= f.steps; ++step) {
      const float keep = f.steps ? static_cast<float>(1 - f.shrink * static_cast<double>(step) / static_cast<double>(f.steps)) : 1;
      const Floats bottom = low * keep;
      const Floats scale = rounded_scale(clamped((high * keep - bottom) / top, MIN_SCALE, MAX_SCALE));
      const Floats zero = rounded(clamped(-bottom / scale - 0.5f, 0, top)) + 0.5f;
      const Floats inverse = 1 / scale;
      Floats sum = {};
      for (int64_t j = 0; j < f.width; ++j) {
        const Floats x = load<Floats>(column + j * TILE);
        const Floats error = (rounded(clamped(x * inverse + zero, 0, top)) - zero) * scale - x;
        sum += f.weights[j] * (error * error);
      }
      const Ints better = step ? sum < best : Ints{} == 0;
      best = better ? sum : best;
      best_scale = better ? scale : best_scale;
      best_zero = better ? zero : best_zero;
    }
    store(scales + part * LANES, best_scale);
    store(zeros + part * LANES, best_zero);
  }
  rows.write(f.scale, 1, scales);
  rows.write(f.zero, 1, zeros);
}

void round_tile(const ColumnRounding& r, const Rows& rows, std::vector<float>& memory) {
  const int64_t size = r.width * TILE, grids = r.stride ? r.width : 1, step = r.stride ? TILE : 0;
  memory.resize(4 * size + 2 * grids * TILE);
  float *column = memory.data(), *target = column + size, *error = target + size, *codes = error + size;
  float *scales = codes + size, *zeros = scales + grids * TILE;
  rows.read(r.columns, r.width, column);
  rows.read(r.target, r.width, target);
  rows.read(r.scale, grids, scales, 1);
  rows.read(r.zero, grids, zeros);
  const float top = static_cast<float>(r.top);
  for (int64_t j = 0; j < r.width; ++j) {
    const Tile x = gathered(tile(target + j * TILE), r.upper + j, r.width, error, j);
    const Tile scale = tile(scales + j * step), zero = tile(zeros + j * step);
    Tile code, left = tile(column + j * TILE);
    LOPRO_EACH {
      code.part[i] = rounded(clamped(x.part[i] * (1 / scale.part[i]) + zero.part[i], 0, top));
      left.part[i] -= (code.part[i] - zero.part[i]) * scale.part[i];
    }
    put(codes + j * TILE, code);
    put(error + j * TILE, left);
  }
  rows.write(r.codes, r.width, codes);
  rows.write(r.error, r.width, error);
}

// One pass over the codes of a group, whose change since `slope` is `moved`.
void descend_codes(const ColumnDescent& d, int64_t first, int64_t width, const Tile& scale, const float* slope, float* codes,
                   float* moved) {
  const float top = static_cast<float>(d.top);
  for (int64_t j = 0; j < width; ++j) {
    const float* gram = d.gram + (first + j) * d.width + first;
    const Tile now = gathered(tile(slope + j * TILE), gram, 1, moved, width);
    Tile code = tile(codes + j * TILE), move = tile(moved + j * TILE);
    LOPRO_EACH {
      const Floats best = rounded(clamped(now.part[i] / gram[j] / scale.part[i] + code.part[i], 0, top));
      move.part[i] += (code.part[i] - best) * scale.part[i];
      code.part[i] = best;
    }
    put(codes + j * TILE, code);
    put(moved + j * TILE, move);
  }
}

// The least-squares step of a group's scale; none where its rounding would raise the loss.
Tile descend_scale(const ColumnDescent& d, int64_t first, int64_t width, Tile scale, const Tile& zero, const float* slope,
                   const float* codes, float* moved, float* levels) {
  Tile down = {}, normal = {};
  for (int64_t j = 0; j < width; ++j) {
    Tile level = tile(codes + j * TILE);
    LOPRO_EACH level.part[i] -= zero.part[i];
    put(levels + j * TILE, level);
  }
  for (int64_t j = 0; j < width; ++j) {
    const float* gram = d.gram + (first + j) * d.width + first;
    const Tile now = gathered(tile(slope + j * TILE), gram, 1, moved, width);
    const Tile own = gathered(Tile{}, gram, 1, levels, width), level = tile(levels + j * TILE);
    LOPRO_EACH {
      down.part[i] += now.part[i] * level.part[i];
      normal.part[i] += own.part[i] * level.part[i];
    }
  }
  Tile step;
  LOPRO_EACH {
    const Floats old = scale.part[i], most_normal = most(normal.part[i], 1e-30f - Floats{});
    const Floats fitted = rounded_scale(most(old + down.part[i] / most_normal, Floats{}));
    const Floats delta = fitted - old;
    const Ints better = (delta * (delta * normal.part[i] - 2 * down.part[i]) < 0) & (fitted >= MIN_SCALE) & (fitted <= MAX_SCALE);
    step.part[i] = better ? delta : Floats{};
    scale.part[i] = better ? fitted : old;
  }
  for (int64_t j = 0; j < width; ++j) {
    const Tile level = tile(levels + j * TILE);
    Tile move = tile(moved + j * TILE);
    LOPRO_EACH move.part[i] -= step.part[i] * level.part[i];
    put(moved + j * TILE, move);
  }
  return scale;
}

void descend_tile(const ColumnDescent& d, const Rows& rows, std::vector<float>& memory) {
  const int64_t size = d.width * TILE, groups = (d.width + d.group - 1) / d.group;
  memory.resize(4 * size + 2 * groups * TILE + d.group * TILE);
  float *slope = memory.data(), *error = slope + size, *codes = error + size, *moved = codes + size;
  float *scales = moved + size, *zeros = scales + groups * TILE, *levels = zeros + groups * TILE;
  rows.read(d.slope, d.width, slope);
  rows.read(d.error, d.width, error);
  rows.read(d.codes, d.width, codes);
  rows.read(d.scale, groups, scales, 1);
  rows.read(d.zero, groups, zeros);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = g * d.group, width = d.width - first < d.group ? d.width - first : d.group;
    float *s = slope + first * TILE, *c = codes + first * TILE, *m = moved + first * TILE;
    for (int64_t i = 0; i < width * TILE; ++i) m[i] = 0;
    Tile scale = tile(scales + g * TILE);
    descend_codes(d, first, width, scale, s, c, m);
    if (d.scales) {
      scale = descend_scale(d, first, width, scale, tile(zeros + g * TILE), s, c, m, levels);
      put(scales + g * TILE, scale);
      descend_codes(d, first, width, scale, s, c, m);
    }
    for (int64_t j = 0; j < width; ++j) {
      Tile left = tile(error + (first + j) * TILE);
      const Tile move = tile(m + j * TILE);
      LOPRO_EACH left.part[i] += move.part[i];
      put(error + (first + j) * TILE, left);
    }
    for (int64_t k = first + width; k < d.width; ++k)
      put(slope + k * TILE, gathered(tile(slope + k * TILE), d.gram + k * d.width + first, 1, m, width));
  }
  rows.write(d.codes, d.width, codes);
  rows.write(d.error, d.width, error);
  if (d.scales) rows.write(d.scale, groups, scales);
}

template <class Operands>
void over_tiles(const Operands& operands, void (*body)(const Operands&, const Rows&, std::vector<float>&)) {
  const int64_t count = (operands.rows + TILE - 1) / TILE;
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic, 1)
#endif
  for (int64_t index = 0; index < count; ++index) {
    static thread_local std::vector<float> memory;
    body(operands, Rows(index, operands.rows), memory);
  }
}

}  // namespace
}  // namespace lopro
