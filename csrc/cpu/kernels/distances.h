// Products, squared lengths and squared distances in float64.
#pragma once

#include "simd.h"

namespace {

DLVAE_INLINE bool is_finite(float value) { return value - value == 0; }

// Returns the sum of term(x, c) over all features. `term` takes SIMD vectors and scalars.
template <class F>
DLVAE_INLINE double sum_terms(const float* x, const float* c, int64_t features, const F& term) {
  constexpr int64_t STEP = WIDTH / 2;
  Doubles sums[2] = {};
  int64_t d = 0;
  for (; d + 2 * STEP <= features; d += 2 * STEP) {
    unroll<2>([&](auto i) {
      const int64_t at = d + decltype(i)::value * STEP;
      sums[decltype(i)::value] += term(widen(x + at), widen(c + at));
    });
  }
  if (d + STEP <= features) {
    sums[0] += term(widen(x + d), widen(c + d));
    d += STEP;
  }
  double rest = 0;
  for (; d < features; ++d) rest += term((double)x[d], (double)c[d]);
  return total(sums[0] + sums[1]) + rest;
}

// Returns |x - c|^2.
inline double squared_distance(const float* x, const float* c, int64_t features) {
  return sum_terms(x, c, features, [](auto a, auto b) {
    const auto difference = a - b;
    return difference * difference;
  });
}

// Returns x.c.
inline double product_of(const float* x, const float* c, int64_t features) {
  return sum_terms(x, c, features, [](auto a, auto b) { return a * b; });
}

// Returns |v|^2.
inline double squared_norm(const float* v, int64_t features) { return product_of(v, v, features); }

}  // namespace
