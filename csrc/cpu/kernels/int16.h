// Scores of 16-bit integers. One instruction adds two products to each 32-bit sum: twice as many as in float32.
#pragma once

#include "arithmetic.h"

// With AVX2, or AVX-512 without VNNI, a product and an addition take two instructions, which is no faster than float32.
#if defined(DLVAE_VNNI) || (defined(__SSE2__) && !defined(DLVAE_AVX2))
#define DLVAE_INT16
namespace {

DLVAE_INLINE Ints add_pairs(Ints sum, Ints a, Ints b) {
#if defined(DLVAE_VNNI)
  return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#else
  return sum + (Ints)_mm_madd_epi16((__m128i)a, (__m128i)b);
#endif
}
// Rounds to the nearest integer, ties to even.
DLVAE_INLINE Ints rounded(Floats v) {
#if defined(DLVAE_VNNI)
  return (Ints)_mm512_cvtps_epi32(v);
#else
  return (Ints)_mm_cvtps_epi32(v);
#endif
}
DLVAE_INLINE void store_narrow(int16_t* to, Ints v) {
#if defined(DLVAE_VNNI)
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtsepi32_epi16((__m512i)v));
#else
  _mm_storel_epi64((__m128i*)to, _mm_packs_epi32((__m128i)v, (__m128i)v));
#endif
}

// 16-bit integers. A word is two features. Scores are integers, and exact except for the rounding of features.
struct InInt16 {
  using Vector = Ints;
  using Score = int32_t;
  static constexpr Score LARGEST = INT32_MAX;
  static constexpr bool IS_BOUND = false;
  static constexpr int BLOCK_ROWS = ROWS;
  // Fewer rows, so that the running minima of a group fit into registers.
  static constexpr int GROUPED_ROWS = 4;
  // With more features, the sums of the rounding errors might overflow.
  static constexpr int64_t MOST_FEATURES = 8192;

  static int64_t steps(int64_t features) { return (features + 1) / 2; }

#if defined(DLVAE_VNNI)
  static constexpr int COPIES = 1;
  static DLVAE_INLINE Vector spread(const uint32_t* word) { return fill(load<int32_t>(word)); }
#else
  // SSE2 needs an instruction to broadcast a word. Copies broadcast it once per row instead of once per code.
  static constexpr int COPIES = WIDTH;
  static DLVAE_INLINE Vector spread(const uint32_t* word) { return load<Ints>(word); }
#endif
  static DLVAE_INLINE Vector add_product(Vector sum, Vector a, Vector b) { return add_pairs(sum, a, b); }
  // The result is always below the score of a code that does not count.
  static DLVAE_INLINE Score sum(Score score, float margin) {
    const double threshold = (double)score + margin;
    return threshold < LARGEST - 1 ? (Score)threshold : LARGEST - 1;
  }

  // The unit of a code relative to its length equals the unit of a row relative to its length, so that a product stays
  // below 2^31.
  static float code_unit(const Codebook& book) {
    const float unit = book.norm * 2.9e-5f, least = book.peak / 32767;
    return unit > least ? unit : least > 0 ? least : 1;
  }
  static float row_unit(const Codebook& book, const Measure& rows) {
    // Scores and their partial sums stay below 2^31.
    const float largest = rows.norm * book.norm + 0.5f * book.norm * book.norm;
    const float unit = largest / 1.8e9f / code_unit(book), least = rows.peak / 32767;
    return unit > least ? unit : least > 0 ? least : 1;
  }
  static float per_score(const Codebook& book, float row_unit) { return 1 / (row_unit * code_unit(book)); }

  static Floats pack_codes(const Codebook& book, const float* const (&codes)[WIDTH], uint32_t* words) {
    const float unit = code_unit(book), inverse = 1 / unit;
    Floats lost = {};
    const auto negative = [&](Floats code) {
      const Floats value = code * book.scale;
      const Ints whole = rounded(value * inverse);
      const Floats difference = value - __builtin_convertvector(whole, Floats) * unit;
      lost += difference * difference;
      return -whole;
    };
    for_tiles(codes, book.features, [&](int64_t d, int64_t n, const Floats(&tile)[WIDTH]) {
      for (int64_t i = 0; i < n; i += 2) {
        const Ints low = negative(tile[i]) & 0xffff, high = negative(tile[i + 1]) << 16;
        store(words + (d + i) / 2 * PANEL, low | high);
      }
    });
    for (int i = 0; i < WIDTH; ++i) lost[i] = __builtin_sqrtf(lost[i]);
    return lost * 1.0005f;
  }

  static float pack_row(const Codebook& book, const float* x, float unit, float norm, uint32_t* words) {
    const float inverse = 1 / unit;
    int16_t* to = (int16_t*)words;
    Floats sums = {};
    float lost = 0;
    int64_t d = 0;
    for (; d + WIDTH <= book.features; d += WIDTH) {
      const Floats value = load<Floats>(x + d) * book.scale;
      const Ints whole = rounded(value * inverse);
      store_narrow(to + d, whole);
      const Floats difference = value - __builtin_convertvector(whole, Floats) * unit;
      sums += difference * difference;
    }
    for (; d < book.features; ++d) {
      const float value = x[d] * book.scale, whole = __builtin_nearbyintf(value * inverse);
      to[d] = (int16_t)whole;
      const float difference = value - whole * unit;
      lost += difference * difference;
    }
    if (book.features % 2) to[book.features] = 0;
    const float loss = __builtin_sqrtf(lost + total(sums)) * 1.0005f + 0x1p-21f * norm;
    const float error = loss * book.norm + (norm + loss) * book.loss + 0x1p-22f * book.norm * book.norm;
    return 2.01f * error * per_score(book, unit) + 4;
  }

  static const Score* starts(const float* start, int64_t count, float per_score, Score* converted) {
    for (int64_t i = 0; i < count; i += WIDTH) {
      const Floats from = load<Floats>(start + i);
      const Ints whole = rounded(from * per_score);
      store(converted + i, from < InFloat32::LARGEST ? whole : fill(LARGEST));
    }
    return converted;
  }

  static DLVAE_INLINE void begin() {}
  static DLVAE_INLINE void end() {}
  template <int R, int V>
  static DLVAE_INLINE void scores(
      const Score* start, const uint32_t* x, int64_t ld, const uint32_t* panel, int64_t steps, Vector (&sums)[R][V]) {
    vector_scores<InInt16>(start, x, ld, panel, steps, sums);
  }
};

}  // namespace
#endif
