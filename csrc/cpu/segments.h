// Pairs of a row and a code, grouped by code: the input of sums of rows by code.
#pragma once

#include <stdint.h>

namespace dlvae {

// The most terms of a sum that are added in float32 one after another. The sums of such chains are added in float64,
// because the error of a chain grows with its length.
constexpr int64_t SUM_CHAIN = 128;

struct Segments {
  int64_t codes;          // K
  const int64_t* starts;  // [K + 1]: the first pair of each code
  // [P]: the row of each pair; those of a code are in ascending order.
  const uint32_t* rows;
  const float* weights;  // [P]; null if each is `weight`
  float weight;
};

// The work of one thread: the features from first_feature on of code first_code, all codes between, and the features
// before last_feature of code last_code.
struct Share {
  int64_t first_code, first_feature, last_code, last_feature;
};

// The codes that rows are copied from, in bytes: row i of the result has a code of head i % heads.
struct CodeRows {
  const char* data;
  int64_t stride, heads, head_stride, bytes;
};

// The k atoms of each row.
struct Atoms {
  const float* dictionary;  // [atoms, features]
  int64_t features;
  const int64_t* indices;  // [rows, k]
  int64_t rows, k;
  bool is_far;  // the dictionary does not fit into the core's cache
};

}  // namespace dlvae
