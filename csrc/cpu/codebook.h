// A codebook as the searches take it: measured and packed once a call.
#pragma once

#include <stdint.h>

namespace dlvae {

// Rows that go through the codebook together.
constexpr int64_t BLOCK = 64;

struct Codebook {
  const float* codes;  // [K, D], as the caller has them
  int64_t count;       // K
  int64_t features;    // D

  // Of each code, before any scaling; [K].
  float* peaks;   // largest magnitude; infinite or NaN where the code is
  double* norms;  // |c|; 0 where the code is not finite
  bool any_finite;

  // In what follows codes are times `scale`, a power of two that keeps their squares within float32.
  float scale;
  float peak, norm;  // the largest of all finite codes
  float* losses;     // |c - what is packed|, [K]
  float loss;        // the largest

  int64_t steps;    // words of a packed row
  uint32_t* words;  // [panels, steps, PANEL]: features of codes, negated, side by side; null: rows go by differences
  float* start;     // [panels, PANEL]: |c|^2 / 2; the largest float where there is no code, or one that is not finite
};

}  // namespace dlvae
