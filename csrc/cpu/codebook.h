// A codebook as the searches take it: measured and packed once a call.
#pragma once

#include <stdint.h>

namespace dlvae {

// Rows that go through the codebook together.
constexpr int64_t BLOCK = 64;

// So few rows go through the codebook as it is: to pack it would take longer.
constexpr int64_t FEW_ROWS = 16;

// The nearest code of a row so far.
struct Found {
  double distance;  // squared
  int64_t index;    // -1 before the first

  bool is_behind(double other, int64_t k) const {
    return index < 0 || other < distance || (other == distance && k < index);
  }
};

struct Codebook {
  const float* codes;  // [K, D], as the caller has them
  int64_t count;       // K
  int64_t features;    // D

  // Where there are so few rows that nothing is measured or packed: their nearest codes, [N]; else null.
  const Found* found;

  // Scores are found of codes and rows less `centre`; it is null where that does not make codes much shorter.
  const float* centre;   // [D]
  const float* centred;  // [K, D]: fl(c - centre), or the codes themselves

  // For each centred code, before any scaling; [K].
  float* peaks;      // largest magnitude; infinite or NaN where the code is, infinite where it equals an earlier one
  double* norms;     // |c|; 0 where the code is not finite
  uint32_t* hashes;  // equal for equal codes
  bool any_finite;

  // Below, codes are times `scale`, a power of two that keeps their squares within float32.
  float scale;
  float peak, norm;  // the largest of all codes that count: finite ones that equal no earlier one
  bool is_spread;    // The lengths of codes differ so much that each needs its own error bound.
  float* losses;     // |c - what is packed|, [K]
  float loss;        // the largest

  int64_t steps;    // words of a packed row
  uint32_t* words;  // [panels, steps, PANEL]: features of codes, negated, side by side
  float* start;     // [panels, PANEL]: |c|^2 / 2; the largest float where there is no code, or one that does not count
};

}  // namespace dlvae
