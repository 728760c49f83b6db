// Sums of rows by code: the gradient of every gather, and the statistics of a batch.
#pragma once

#include "indices.h"

namespace dlvae {

// Pairs of a row and a code, sorted by code with a counting sort. Pair p belongs to row p / per_row.
class SortedPairs {
 public:
  // weights: one per pair, or null. left_out: a flag per row, whose pairs are skipped if it is set, or null.
  SortedPairs(const Indices& codes, int64_t per_row, int64_t num_codes, const float* weights, const bool* left_out);
  Segments segments(float weight) const;
  int64_t count_of(int64_t code) const { return starts_[code + 1] - starts_[code]; }

 private:
  int64_t codes_;
  Array<int64_t> starts_;
  Array<uint32_t> rows_;
  Array<float> weights_;  // null if pairs have no weights
};

// sums[c, 0:D] = sum of weight * row over the pairs of code c. SUM_CHAIN consecutive pairs are added in float32 in the
// order of the pairs, and these partial sums are added in float64. The result is bitwise equal for any number of
// threads. The weight is that of the pair, or `weight`.
void segment_sum(const Rows& rows, const SortedPairs& pairs, int64_t per_row, float weight, float* sums, int64_t ld);

}  // namespace dlvae
