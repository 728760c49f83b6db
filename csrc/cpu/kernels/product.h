// Products of blocks of rows with a matrix in panels [panels][steps][PANEL].
//
// A register sums CHAIN products, and is then added to the sum in memory. The error of a sum therefore grows with CHAIN
// + steps / CHAIN, not with steps.
#pragma once

#include "simd.h"

namespace {

constexpr int64_t CHAIN = 64;
// The number of steps of a panel that stay in the first-level cache while all rows of a block use them.
constexpr int64_t SLICE = 4 * CHAIN;

inline int64_t panels_of(int64_t columns) { return (columns + PANEL - 1) / PANEL; }
inline int64_t whole_tiles(int64_t rows) { return (rows + ROWS - 1) / ROWS * ROWS; }

// The layout of the left factor: rows one after another, `ld` elements apart; or tiles of ROWS interleaved rows, `ld`
// steps apart.
struct RowMajor {
  int64_t ld;
  DLVAE_INLINE int64_t tile() const { return ROWS * ld; }
  DLVAE_INLINE int64_t row(int r) const { return r * ld; }
  DLVAE_INLINE int64_t step() const { return 1; }
};
struct Tiled {
  int64_t ld;
  DLVAE_INLINE int64_t tile() const { return ROWS * ld; }
  DLVAE_INLINE int64_t row(int r) const { return r; }
  DLVAE_INLINE int64_t step() const { return ROWS; }
};

// Computes one tile of ROWS x PANEL. `start`, unless null, is added after the last step.
template <class Layout>
DLVAE_INLINE void multiply_tile(
    const float* x, Layout layout, const float* panel, int64_t steps, float* out, int64_t ld, const float* start,
    bool adds) {
  for (int64_t s0 = 0; s0 < steps; s0 += CHAIN) {
    const int64_t s1 = s0 + CHAIN < steps ? s0 + CHAIN : steps;
    Floats sums[ROWS][2];
    unroll<ROWS>([&](auto r) { sums[decltype(r)::value][0] = sums[decltype(r)::value][1] = Floats{}; });
    for (int64_t s = s0; s < s1; ++s) {
      const Floats low = load<Floats>(panel + s * PANEL), high = load<Floats>(panel + s * PANEL + WIDTH);
      unroll<ROWS>([&](auto r) {
        constexpr int i = decltype(r)::value;
        const Floats value = fill(x[layout.row(i) + s * layout.step()]);
        sums[i][0] += value * low;
        sums[i][1] += value * high;
      });
    }
    const bool has_sum = adds || s0 > 0;
    const bool has_start = start != nullptr && s1 == steps;
    unroll<ROWS>([&](auto r) {
      constexpr int i = decltype(r)::value;
      unroll<2>([&](auto v) {
        constexpr int j = decltype(v)::value;
        float* to = out + i * ld + j * WIDTH;
        Floats sum = sums[i][j];
        if (has_sum) sum += load<Floats>(to);
        if (has_start) sum += load<Floats>(start + j * WIDTH);
        store(to, sum);
      });
    });
  }
}

// out[r][p * PANEL + i] = sum over s of x[r][s] * panels[p][s][i], plus start[p * PANEL + i] unless `start` is null,
// plus the previous value if it adds. All tiles are whole: x and out have whole_tiles(rows) rows.
template <class Layout>
inline void multiply(
    const float* x, Layout layout, int64_t rows, const float* panels, int64_t panel_stride, int64_t count,
    int64_t steps, float* out, int64_t ld, const float* start, bool adds) {
  for (int64_t p = 0; p < count; ++p) {
    for (int64_t s0 = 0; s0 == 0 || s0 < steps; s0 += SLICE) {
      const bool is_last = s0 + SLICE >= steps;
      const int64_t n = is_last ? steps - s0 : SLICE;
      const float* panel = panels + p * panel_stride + s0 * PANEL;
      const float* first = is_last && start != nullptr ? start + p * PANEL : nullptr;
      for (int64_t r = 0; r < rows; r += ROWS)
        multiply_tile(
            x + r / ROWS * layout.tile() + s0 * layout.step(), layout, panel, n, out + r * ld + p * PANEL, ld, first,
            adds || s0 > 0);
    }
  }
}

// Packs panels [begin, end) of the transpose of rows [count, features] times factor. The columns are all rows, or those
// that `ids` lists. Columns beyond the last are zero.
inline void pack_transposed(
    const float* rows, const int32_t* ids, int64_t count, int64_t features, float factor, int64_t begin, int64_t end,
    float* panels) {
  for (int64_t p = begin; p < end; ++p) {
    float* panel = panels + p * features * PANEL;
    for (int64_t i = 0; i < PANEL; ++i) {
      const int64_t c = p * PANEL + i;
      if (c >= count) {
        for (int64_t d = 0; d < features; ++d) panel[d * PANEL + i] = 0;
        continue;
      }
      const float* row = rows + (ids == nullptr ? c : ids[c]) * features;
      for (int64_t d = 0; d < features; ++d) panel[d * PANEL + i] = row[d] * factor;
    }
  }
}

// Packs columns [first, first + n) of rows [count, ld] into a panel [count][PANEL], with zeros beyond n.
inline void pack_columns(const float* rows, int64_t ld, int64_t count, int64_t n, float* panel) {
  for (int64_t r = 0; r < count; ++r) {
    const float* from = rows + r * ld;
    float* to = panel + r * PANEL;
    if (n == PANEL) {
      store(to, load<Floats>(from));
      store(to + WIDTH, load<Floats>(from + WIDTH));
      continue;
    }
    for (int64_t i = 0; i < PANEL; ++i) to[i] = i < n ? from[i] : 0;
  }
}

}  // namespace
