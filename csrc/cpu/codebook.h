// A codebook in the form that the searches read: measured and packed once per call.
#pragma once

#include <stdint.h>

namespace dlvae {

// The number of rows that pass through the codebook together.
constexpr int64_t BLOCK = 64;

// At most this many rows are searched without packing the codebook, which would take longer than the search.
constexpr int64_t FEW_ROWS = 16;

// The nearest code of a row, so far.
struct Found {
  double distance;  // squared
  int64_t index;    // -1 before the first

  bool loses_to(double other, int64_t k) const {
    return index < 0 || other < distance || (other == distance && k < index);
  }
};

struct Codebook {
  const float* codes;  // [K, D], as the caller passed them
  int64_t count;       // K
  int64_t features;    // D

  // The nearest codes [N] if the rows are so few that nothing is measured or packed, else null.
  const Found* found;

  // Scores are computed for codes and rows minus `centre`. It is null if subtracting it does not make codes much
  // shorter.
  const float* centre;   // [D]
  const float* centred;  // [K, D]: fl(c - centre), or the codes themselves

  // For each centred code, before scaling; [K].
  float* peaks;      // largest magnitude; infinite or NaN if the code is, infinite if it equals an earlier code
  double* norms;     // |c|; 0 if the code is not finite
  uint32_t* hashes;  // equal for equal codes
  bool any_finite;

  // The fields below are for codes times `scale`, a power of two that keeps their squares within float32.
  float scale;
  float peak, norm;  // the largest of all codes that count: those that are finite and equal no earlier one
  bool is_spread;    // the lengths of codes differ so much that each needs its own error bound
  float* losses;     // [K]: |c - packed c|
  float loss;        // the largest of `losses`

  int64_t steps;    // number of words in a packed row
  uint32_t* words;  // [panels, steps, PANEL]: features of codes, negated, interleaved
  float* start;     // [panels, PANEL]: |c|^2 / 2; the largest float for padding and for codes that do not count
};

}  // namespace dlvae
