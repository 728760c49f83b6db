// Sums of rows by code in a fixed order. Pairs of a row and a code are sorted by code, which keeps the order of rows,
// and summed in float32 in chunks of a size that does not depend on the device. The partial sums of a code in several
// chunks are added in float64.
#pragma once

#include "launch.h"

namespace dlvae {

// Pairs [P] of a row and a code. Pair p belongs to row p / per_row.
struct Pairs {
  const int64_t* codes;  // those outside [0, K) are skipped, where K is num_codes / heads
  int64_t count, per_row;
  int64_t num_codes;     // of all heads
  const bool* left_out;  // [rows]: flags of rows whose pairs are skipped; or null
  const float* weights;  // [P]; null if each is 1
  int64_t heads = 1;     // row r belongs to head r % heads
};

class SortedPairs {
 public:
  SortedPairs(const Tensor& like, const Pairs& pairs, const Device& device);

  // sums[c] [., D], `ld` apart: the sum of weight * row over the pairs of code c, times *scale unless that is null.
  void sum(
      const Tensor& like, const Rows& rows, const float* scale, float* sums, int64_t ld, const Device& device) const;
  // counts[c * ld]: the number of pairs of code c.
  void count(float* counts, int64_t ld, const Device& device) const;

 private:
  Pairs pairs_;
  Tensor keys_, order_, starts_;
};

}  // namespace dlvae
