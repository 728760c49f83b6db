// Squared lengths and distances in float64.
#pragma once

#include "simd.h"

namespace {

DLVAE_INLINE bool is_finite(float value) { return value - value == 0; }

// |x - c|^2.
inline double squared_distance(const float* x, const float* c, int64_t features) {
  constexpr int64_t STEP = WIDTH / 2;
  Doubles sums[2] = {};
  int64_t d = 0;
  for (; d + 2 * STEP <= features; d += 2 * STEP) {
    unroll<2>([&](auto i) {
      const int64_t at = d + decltype(i)::value * STEP;
      const Doubles difference = widen(x + at) - widen(c + at);
      sums[decltype(i)::value] += difference * difference;
    });
  }
  if (d + STEP <= features) {
    const Doubles difference = widen(x + d) - widen(c + d);
    sums[0] += difference * difference;
    d += STEP;
  }
  double rest = 0;
  for (; d < features; ++d) {
    const double difference = (double)x[d] - (double)c[d];
    rest += difference * difference;
  }
  return total(sums[0] + sums[1]) + rest;
}

// |v|^2.
inline double squared_norm(const float* v, int64_t features) {
  constexpr int64_t STEP = WIDTH / 2;
  Doubles sum = {};
  int64_t d = 0;
  for (; d + STEP <= features; d += STEP) {
    const Doubles part = widen(v + d);
    sum += part * part;
  }
  double rest = 0;
  for (; d < features; ++d) rest += (double)v[d] * (double)v[d];
  return total(sum) + rest;
}

}  // namespace
