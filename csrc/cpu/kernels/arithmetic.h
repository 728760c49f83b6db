// The arithmetics in which scores |c|^2 / 2 - x.c are found. A packed row is `steps` words of 32 bits; a score, whatever
// its unit, is the start of its code plus the products of the words of both.
#pragma once

#include "../codebook.h"
#include "simd.h"

namespace {

using dlvae::Codebook;

// A word is one feature in float32.
struct InFloat32 {
  using Vector = Floats;
  using Score = float;
  static constexpr Score LARGEST = 3e38f;

  static int64_t steps(int64_t features) { return features; }
  static DLVAE_INLINE Vector spread(const uint32_t* word) { return fill(load<float>(word)); }
  static DLVAE_INLINE Vector add_product(Vector sum, Vector a, Vector b) { return sum + a * b; }
  static DLVAE_INLINE Score sum(Score score, float margin) { return score + margin; }
};

#if defined(DLVAE_VNNI)
// A word is two features as 16-bit integers; their products are summed in 32 bits, exactly.
struct InInt16 {
  using Vector = Ints;
  using Score = int32_t;
  static constexpr Score LARGEST = INT32_MAX;

  static int64_t steps(int64_t features) { return (features + 1) / 2; }
  static DLVAE_INLINE Vector spread(const uint32_t* word) { return fill(load<int32_t>(word)); }
  static DLVAE_INLINE Vector add_product(Vector sum, Vector a, Vector b) {
    return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
  }
  // Never that of a code that does not count.
  static DLVAE_INLINE Score sum(Score score, float margin) {
    const double threshold = (double)score + margin;
    return threshold < LARGEST - 1 ? (Score)threshold : LARGEST - 1;
  }
  static DLVAE_INLINE Vector round(Floats value) { return (Ints)_mm512_cvtps_epi32(value); }

  // The integers of a row, in pairs; returns the length of what is lost, or more.
  static float pack_row(const float* x, int64_t features, float scale, float unit, uint32_t* words) {
    const float inverse = 1 / unit;
    float lost = 0;
    int64_t d = 0;
    int16_t* whole = (int16_t*)words;
    Floats sum = {};
    for (; d + WIDTH <= features; d += WIDTH) {
      const Floats value = load<Floats>(x + d) * scale;
      const __m512i rounded = _mm512_cvtps_epi32(value * inverse);
      _mm256_storeu_si256((__m256i*)(whole + d), _mm512_cvtsepi32_epi16(rounded));
      const Floats difference = value - _mm512_cvtepi32_ps(rounded) * unit;
      sum += difference * difference;
    }
    for (; d < features; ++d) {
      const float value = x[d] * scale, rounded = __builtin_nearbyintf(value * inverse);
      whole[d] = (int16_t)rounded;
      const float difference = value - rounded * unit;
      lost += difference * difference;
    }
    if (features % 2) whole[features] = 0;
    return __builtin_sqrtf(lost + total(sum)) * 1.0005f;
  }
};
#endif

// The scores of a panel before any product, of each of R rows.
template <class A, int R, int V>
DLVAE_INLINE void begin_scores(const typename A::Score* start, typename A::Vector (&sums)[R][V]) {
  unroll<V>([&](auto v) {
    constexpr int i = decltype(v)::value;
    const auto first = load<typename A::Vector>(start + i * WIDTH);
    unroll<R>([&](auto r) { sums[decltype(r)::value][i] = first; });
  });
}

// sums[r][v] += products of row r, at x + r * ld, with vector v of adjacent panels.
template <class A, int R, int V>
DLVAE_INLINE void add_products(
    const uint32_t* x, int64_t ld, const uint32_t* panel, int64_t steps, typename A::Vector (&sums)[R][V]) {
  using Vector = typename A::Vector;
  for (int64_t s = 0; s < steps; ++s) {
    Vector codes[V];
    unroll<V>([&](auto v) {
      constexpr int i = decltype(v)::value;
      codes[i] = load<Vector>(panel + (i / 2 * steps + s) * PANEL + i % 2 * WIDTH);
    });
    unroll<R>([&](auto r) {
      constexpr int j = decltype(r)::value;
      const Vector value = A::spread(x + j * ld + s);
      unroll<V>([&](auto v) {
        constexpr int i = decltype(v)::value;
        sums[j][i] = A::add_product(sums[j][i], value, codes[i]);
      });
    });
  }
}

}  // namespace
