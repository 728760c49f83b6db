// Sums of rows by code, always in the same order: pairs of a row and a code are sorted by code, which keeps the order
// of rows, and summed in float32 in chunks of the same size whatever the device. What a code has in several chunks is
// added in float64.
#pragma once

#include "launch.h"

namespace dlvae {

// Pairs [P] of a row and a code: pair p is of row p / per_row.
struct Pairs {
  const int64_t* codes;  // those outside [0, K) are left out
  int64_t count, per_row;
  int64_t num_codes;
  const bool* left_out;  // [rows]: rows whose pairs are left out; or null
  const float* weights;  // [P], or null where each is 1
};

class SortedPairs {
 public:
  SortedPairs(const Tensor& like, const Pairs& pairs, const Device& device);

  // sums[c] [., D], `ld` apart: of weight * row over the pairs of code c, times *scale unless that is null.
  void sum(
      const Tensor& like, const Rows& rows, const float* scale, float* sums, int64_t ld, const Device& device) const;
  // counts[c * ld]: how many pairs code c has.
  void count(float* counts, int64_t ld, const Device& device) const;

 private:
  Pairs pairs_;
  Tensor keys_, order_, starts_;
};

}  // namespace dlvae
