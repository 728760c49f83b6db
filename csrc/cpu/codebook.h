// A codebook as the searches take it: measured and packed once a call.
#pragma once

#include <stdint.h>

namespace dlvae {

struct Codebook {
  const float* codes;  // [K, D], as the caller has them
  int64_t count;       // K
  int64_t features;    // D

  // Of each code the largest magnitude; infinite or NaN where the code is. [K]
  float* peaks;
  // What follows is of codes times `scale`, a power of two that keeps their squares within float32.
  float scale;
  float peak;      // the largest of all finite codes
  float* norms;    // |c|, [K]; 0 of a code that is not finite
  float* losses;   // |c - what is packed|, [K]
  float norm, loss;  // their largest

  int64_t steps;    // words of a packed row
  uint32_t* words;  // [panels, steps, PANEL]: features of codes, negated, side by side
  float* start;     // [panels, PANEL]: |c|^2 / 2; the largest float where there is no code, or one that is not finite
  bool any_finite;
};

}  // namespace dlvae
