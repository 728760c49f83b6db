// Sums of rows by code: the gradient of every gather, and the statistics of a batch.
#pragma once

#include "indices.h"

namespace dlvae {

inline bool all_finite(const float* values, int64_t count) {
  float sum = 0;  // a sum of zeros, or NaN if a value is not finite
  for (int64_t i = 0; i < count; ++i) sum += values[i] * 0;
  return sum == 0;
}

// Throws unless there is a code in each head, and the rows are whole vectors of num_heads.
void check_codes(int64_t num_codes, int64_t num_heads, const Rows& rows);

// Pairs of a row and a code, sorted by code with a counting sort. Pair p belongs to row p / per_row, and row r to head
// r % num_heads, whose code k is code head * num_codes + k of all. Pairs of index -1 (no code) are left out.
class SortedPairs {
 public:
  // weights: one per pair, or null. left_out: a flag per row, whose pairs are skipped if it is set, or null.
  SortedPairs(
      const Indices& codes, int64_t per_row, int64_t num_codes, int64_t num_heads, const float* weights,
      const bool* left_out);
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
//
// A SegmentSum computes the same from rows that come block by block. A pair has one row.
class SegmentSum {
 public:
  SegmentSum(const Segments& segments, int64_t features, float* sums, int64_t ld);
  // Adds rows [begin, end), which are at data[., data_ld]; the rows of the first call begin at 0.
  void add(int64_t begin, int64_t end, const float* data, int64_t data_ld) const;

  // The same for the part of one of `threads`; is_far: the rows are not in the core's cache.
  void add_part(int64_t thread, int64_t begin, int64_t end, const float* data, int64_t data_ld, bool is_far) const;
  int64_t threads() const { return threads_; }

 private:
  Segments segments_;
  int64_t features_, ld_, threads_;
  float* sums_;
  Array<int64_t> places_;
  Array<double> totals_;
};
void segment_sum(const Rows& rows, const SortedPairs& pairs, int64_t per_row, float weight, float* sums, int64_t ld);

}  // namespace dlvae
