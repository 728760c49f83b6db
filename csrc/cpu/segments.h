// Pairs of a row and a code, grouped by code: what sums of rows by code go through.
#pragma once

#include <stdint.h>

namespace dlvae {

// The most terms of a sum that are added in float32, one after another. The sums of such chains are added in float64:
// the error of a chain grows with its length.
constexpr int64_t SUM_CHAIN = 128;

struct Segments {
  int64_t codes;          // K
  const int64_t* starts;  // [K + 1]: where the pairs of each code begin
  // Of each pair, those of a code in the order of their rows. [P]
  const uint32_t* rows;
  const float* weights;  // or null where each is `weight`
  float weight;
};

// What one thread sums: of code first_code the features from first_feature on, all of the codes between,
// and of last_code those before last_feature.
struct Share {
  int64_t first_code, first_feature, last_code, last_feature;
};

// The k atoms of each row.
struct Atoms {
  const float* dictionary;  // [., features]
  int64_t features;
  const int64_t* indices;  // [rows, k]
  int64_t rows, k;
  bool is_far;  // the dictionary lies beyond a core's cache
};

}  // namespace dlvae
