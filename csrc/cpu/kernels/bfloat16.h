// Scores of bfloat16 terms on the matrix tiles of AMX. A feature is the sum of a high and a low term, and a product is
// the sum of three products: [x_high, x_high, x_low] . [c_high, c_low, c_high]. They form one long row of 3 D columns,
// so that few features fill one step of a tile.
#pragma once

#include "arithmetic.h"

#if defined(DLVAE_AMX)
#include "amx_tiles.h"

namespace {

// A word is two columns.
struct InBFloat16 {
  using Vector = Floats;
  using Score = float;
  static constexpr Score LARGEST = 3e38f;
  static constexpr bool IS_BOUND = false;
  // Two tiles of rows by two tiles of codes.
  static constexpr int COPIES = 1;
  static constexpr int BLOCK_ROWS = 2 * TILE_ROWS;
  static constexpr int GROUPED_ROWS = BLOCK_ROWS;

  static int64_t steps(int64_t features) { return (3 * features + 2 * TILE_STEPS - 1) / (2 * TILE_STEPS) * TILE_STEPS; }

  static DLVAE_INLINE Vector spread(const uint32_t* word) { return fill(load<float>(word)); }
  static DLVAE_INLINE Vector add_product(Vector sum, Vector a, Vector b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
  static DLVAE_INLINE Score sum(Score score, float margin) { return score + margin; }

  static Floats pack_codes(const Codebook& book, const float* const (&codes)[WIDTH], uint32_t* words) {
    for (int64_t s = 0; s < book.steps; ++s) store(words + s * PANEL, Ints{});
    for (int i = 0; i < WIDTH; ++i)
      if (codes[i]) pack_code(book, codes[i], words + i);
    return Floats{};
  }
  static void pack_code(const Codebook& book, const float* code, uint32_t* words) {
    const int64_t features = book.features;
    const auto put = [&](int64_t column, BFloat16 value) {
      words[column / 2 * PANEL] |= (uint32_t)value.bits << column % 2 * 16;
    };
    for (int64_t d = 0; d < features; ++d) {
      const float value = -code[d] * book.scale;
      BFloat16 high, low;
      from_float(value, &high);
      from_float(value - to_float(high), &low);
      put(d, high);
      put(features + d, low);
      put(2 * features + d, high);
    }
  }
  static float row_unit(const Codebook&, const Measure&) { return 1; }
  static float per_score(const Codebook&, float) { return 1; }
  static float pack_row(const Codebook& book, const float* x, float, float norm, uint32_t* words) {
    const int64_t features = book.features;
    BFloat16* to = (BFloat16*)words;
    for (int64_t d = 0; d < features; ++d) {
      const float value = x[d] * book.scale;
      BFloat16 high;
      from_float(value, &high);
      from_float(value - to_float(high), to + 2 * features + d);
      to[d] = to[features + d] = high;
    }
    memset(to + 3 * features, 0, (2 * book.steps - 3 * features) * sizeof(BFloat16));
    // docs/numerics.md, 4.2 and 5.4: the terms omit at most 2^-17 of a feature in each factor, and the product of the
    // low terms is at most 2^-16; sums of 3 D products round, and flush subnormal numbers to zero.
    const float product = norm * book.norm, largest = 0.5f * book.norm * book.norm + 1.02f * product;
    return 2.1f * (0x1p-15f * product + (3 * features + 8) * (0x1p-24f * largest + 0x1p-120f));
  }
  static const Score* starts(const float* start, int64_t, float, Score*) { return start; }

  static DLVAE_INLINE void begin() { begin_tiles(); }
  static DLVAE_INLINE void end() { end_tiles(); }

  // A full block runs on the tiles. Fewer rows, which are searched a second time, run on vectors.
  template <int R, int V>
  static DLVAE_INLINE void scores(
      const Score* start, const uint32_t* x, int64_t ld, const uint32_t* panel, int64_t steps, Vector (&sums)[R][V]) {
    if constexpr (R == BLOCK_ROWS && V == 2) {
      tile_scores(start, x, ld, panel, steps, (float*)sums);
    } else {
      vector_scores<InBFloat16>(start, x, ld, panel, steps, sums);
    }
  }
};

}  // namespace
#endif
