// The arithmetics that compute scores |c|^2 / 2 - x.c (docs/numerics.md, section 2): the smallest wins. A packed row has
// `steps` words of 32 bits. A score is the start of its code plus the products of the words of both, in a unit that the
// arithmetic chooses. Each arithmetic defines how a code and a row are packed, and a bound on the error of the
// difference of two scores. docs/numerics.md, section 5, derives the bounds.
#pragma once

#include "../codebook.h"
#include "rows_kernel.h"
#include "simd.h"
#include "transpose.h"

namespace {

using dlvae::BLOCK;
using dlvae::Codebook;

// In the scale of the codes. Longer codes are never nearest to a row that has scores; see LARGEST_FEATURE.
constexpr double LARGEST_NORM = 0x1p42;

// Properties of the rows of a block before they are packed, in the scale of the codes.
struct Measure {
  float peak = 0, norm = 0;  // the largest of all rows that are not slow
  float norms[BLOCK];        // |x| or more; 0 for a slow row
  bool is_slow[BLOCK];       // not finite, or too large for scores: searched by differences
};

// Calls f(first feature, number of features, tile) for every WIDTH features of WIDTH codes, where null stands for a
// code of zeros. Vector i of a tile holds feature i of all codes. Beyond the last feature the tile holds zeros.
template <class F>
DLVAE_INLINE void for_tiles(const float* const (&codes)[WIDTH], int64_t features, const F& f) {
  for (int64_t d = 0; d < features; d += WIDTH) {
    const int64_t n = features - d < WIDTH ? features - d : WIDTH;
    Floats tile[WIDTH] = {};
    for (int i = 0; i < WIDTH; ++i)
      if (codes[i]) memcpy(&tile[i], codes[i] + d, n * sizeof(float));
    transpose(tile);
    f(d, n, tile);
  }
}

// float32. A word is one feature.
struct InFloat32 {
  using Vector = Floats;
  using Score = float;
  static constexpr Score LARGEST = 3e38f;
  // Whether a score is a lower bound that includes the error of its own code, instead of a score with one error bound
  // for all codes.
  static constexpr bool IS_BOUND = false;
  static constexpr int BLOCK_ROWS = ROWS;
  // Fewer rows, so that the running minima of a group fit into registers.
  static constexpr int GROUPED_ROWS = 4;

  static int64_t steps(int64_t features) { return features; }

  // The number of copies of each word of a packed row, side by side.
  static constexpr int COPIES = 1;
  static DLVAE_INLINE Vector spread(const uint32_t* word) { return fill(load<float>(word)); }
  static DLVAE_INLINE Vector add_product(Vector sum, Vector a, Vector b) { return sum + a * b; }
  static DLVAE_INLINE Score sum(Score score, float margin) { return score + margin; }

  // Packs negated codes, where null stands for zeros, into steps PANEL words apart. Returns an upper bound of |c -
  // packed c| for each code.
  static Floats pack_codes(const Codebook& book, const float* const (&codes)[WIDTH], uint32_t* words) {
    for_tiles(codes, book.features, [&](int64_t d, int64_t n, const Floats(&tile)[WIDTH]) {
      for (int64_t i = 0; i < n; ++i) store(words + (d + i) * PANEL, -tile[i] * book.scale);
    });
    return Floats{};
  }
  // Returns the unit of the rows of a block.
  static float row_unit(const Codebook&, const Measure&) { return 1; }
  // Returns the factor from the scale of the codes to units of a score.
  static float per_score(const Codebook&, float) { return 1; }
  // Packs a row. Returns the error bound of the difference of two of its scores.
  static float pack_row(const Codebook& book, const float* x, float, float norm, uint32_t* words) {
    float* to = (float*)words;
    for (int64_t d = 0; d < book.features; ++d) to[d] = x[d] * book.scale;
    // D + 2 roundings of partial sums.
    return (book.features + 2) * 0x1.2p-23f * (0.5f * book.norm * book.norm + norm * book.norm) + 0x1p-120f;
  }
  // Returns the starts of codes in the unit of scores.
  static const Score* starts(const float* start, int64_t, float, Score*) { return start; }

  static DLVAE_INLINE void begin() {}
  static DLVAE_INLINE void end() {}
  // sums[r][v] = scores of row r, at x + r * ld, and the codes of vector v of adjacent panels.
  template <int R, int V>
  static DLVAE_INLINE void scores(
      const Score* start, const uint32_t* x, int64_t ld, const uint32_t* panel, int64_t steps, Vector (&sums)[R][V]);
};

template <class A, int R, int V>
DLVAE_INLINE void vector_scores(
    const typename A::Score* start, const uint32_t* x, int64_t ld, const uint32_t* panel, int64_t steps,
    typename A::Vector (&sums)[R][V]) {
  using Vector = typename A::Vector;
  unroll<V>([&](auto v) {
    constexpr int i = decltype(v)::value;
    const Vector first = load<Vector>(start + i * WIDTH);
    unroll<R>([&](auto r) { sums[decltype(r)::value][i] = first; });
  });
  for (int64_t s = 0; s < steps; ++s) {
    Vector codes[V];
    unroll<V>([&](auto v) {
      constexpr int i = decltype(v)::value;
      codes[i] = load<Vector>(panel + (i / 2 * steps + s) * PANEL + i % 2 * WIDTH);
    });
    unroll<R>([&](auto r) {
      constexpr int j = decltype(r)::value;
      const Vector value = A::spread(x + j * ld + s * A::COPIES);
      unroll<V>([&](auto v) {
        constexpr int i = decltype(v)::value;
        sums[j][i] = A::add_product(sums[j][i], value, codes[i]);
      });
    });
  }
}

template <int R, int V>
DLVAE_INLINE void InFloat32::scores(
    const Score* start, const uint32_t* x, int64_t ld, const uint32_t* panel, int64_t steps, Vector (&sums)[R][V]) {
  vector_scores<InFloat32>(start, x, ld, panel, steps, sums);
}

// Returns half the largest difference that float64 rounding causes between two distances of a row, for codes no longer
// than the row: codes that float64 does not distinguish must tie.
inline float rounding_of_distances(const Codebook& book, float row_norm) {
  return (float)(book.features + 2) * 0x1p-51f * row_norm * row_norm;
}

// float32 scores of codes of very different lengths: each score is a lower bound that includes the error of its own
// code. The error of a score is at most `relative_error` times (|c|^2 / 2 + |x| |c|). It is subtracted from the score:
// |c|^2 / 2 in the start of the code, and |x| |c| as an additional feature whose value in a row is |x|.
struct LowerBounds : InFloat32 {
  static constexpr bool IS_BOUND = true;
  // Shorter codes use the error of this length, because products below the smallest normal number may be lost.
  static constexpr float LEAST_NORM = 0x1p-90f;

  static int64_t steps(int64_t features) { return features + 1; }

  // D + 4 roundings of partial sums and of the bound itself, plus those of the centred row and code.
  static float relative_error(const Codebook& book) {
    return (float)(book.features + (book.centre ? 6 : 4)) * 0x1.2p-24f;
  }
  static float error(const Codebook& book, float row_norm, float code_norm) {
    return relative_error(book) * (0.5f * code_norm * code_norm + row_norm * (code_norm + LEAST_NORM)) +
           (float)book.features * 0x1p-124f + rounding_of_distances(book, row_norm);
  }

  static Floats pack_codes(const Codebook& book, const float* const (&codes)[WIDTH], uint32_t* words) {
    InFloat32::pack_codes(book, codes, words);
    Floats errors = {};
    for (int i = 0; i < WIDTH; ++i) {
      if (!codes[i]) continue;
      const double norm = book.norms[(codes[i] - book.centred) / book.features] * book.scale;
      errors[i] = relative_error(book) * (float)(norm + LEAST_NORM);
    }
    store(words + book.features * PANEL, -errors);
    return Floats{};
  }
  // Returns |x|, from which `error` follows.
  static float pack_row(const Codebook& book, const float* x, float, float norm, uint32_t* words) {
    float* to = (float*)words;
    for (int64_t d = 0; d < book.features; ++d) to[d] = x[d] * book.scale;
    to[book.features] = norm;
    return norm;
  }
};

}  // namespace
