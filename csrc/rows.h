// A matrix of rows from a tensor [..., D] with any strides, in plain numbers. A row is one vector of the batch, or one
// code.
#pragma once

#include <stdint.h>

namespace dlvae {

enum class Type : int { float32, bfloat16, float16 };

struct Rows {
  // More dimensions of at least two elements do not fit into any memory.
  static constexpr int MAX_DIMS = 36;

  void* data;
  Type type;
  int64_t count;     // N
  int64_t features;  // D
  int64_t stride;    // stride of features, in elements
  // The dimensions of rows, the outermost first. Dimensions that can be merged into one are merged.
  int dims;
  int64_t sizes[MAX_DIMS];
  int64_t strides[MAX_DIMS];
};

// Rows of float32 that follow one another at `data`.
static inline Rows contiguous_rows(float* data, int64_t count, int64_t features) {
  Rows rows{};
  rows.data = data;
  rows.type = Type::float32;
  rows.count = rows.sizes[0] = count;
  rows.features = rows.strides[0] = features;
  rows.stride = rows.dims = 1;
  return rows;
}

// Whether the rows are float32 with adjacent features and one stride from row to row.
static inline bool is_dense(const Rows& rows) {
  return rows.type == Type::float32 && rows.stride == 1 && rows.dims == 1;
}

// Whether the rows are dense and follow one another without gaps.
static inline bool is_contiguous(const Rows& rows) {
  return is_dense(rows) && (rows.count == 1 || rows.strides[0] == rows.features);
}

}  // namespace dlvae
