// Access to elements of rows [..., D] with any strides, and to blocks of them through shared memory.
#pragma once

#include "launch.h"

namespace dlvae {

inline __device__ float load_element(const Rows& rows, int64_t offset) {
  switch (rows.type) {
    case Type::float32: return static_cast<const float*>(rows.data)[offset];
    case Type::bfloat16: return to_float(static_cast<const __nv_bfloat16*>(rows.data)[offset]);
    default: return to_float(static_cast<const __half*>(rows.data)[offset]);
  }
}

inline __device__ void store_element(const Rows& rows, int64_t offset, float value) {
  switch (rows.type) {
    case Type::float32: from_float(value, static_cast<float*>(rows.data) + offset); break;
    case Type::bfloat16: from_float(value, static_cast<__nv_bfloat16*>(rows.data) + offset); break;
    default: from_float(value, static_cast<__half*>(rows.data) + offset);
  }
}

// A block of 32 rows and 32 features for 256 threads. Adjacent lanes access adjacent elements: features, or rows if
// those are adjacent, so that channels-first maps are read at full speed too.
struct RowBlock {
  static constexpr int ROWS = 32, FEATURES = 32, THREADS = 256;
  static constexpr int WARPS = THREADS / 32, ROWS_OF_WARP = ROWS / WARPS;
  static unsigned blocks_of(int64_t rows) { return blocks(ceil_div(rows, ROWS)); }
  using Tile = float[ROWS][FEATURES + 1];  // padding avoids bank conflicts between rows

  const Rows& rows;
  const int64_t* offsets;  // [ROWS], in shared memory: the offset of each row
  int count;               // number of rows

  // Fills `offsets` for the rows from `first` up to `end`. The block must be synchronised before they are used.
  __device__ RowBlock(const Rows& rows, int64_t first, int64_t end, int64_t* offsets)
      : rows(rows), offsets(offsets), count(end - first < ROWS ? (int)(end - first) : ROWS) {
    if ((int)threadIdx.x < count) offsets[threadIdx.x] = row_offset(rows, first + threadIdx.x);
  }

  // Calls f(row, feature) for each existing element of features [first, first + FEATURES).
  template <class F>
  __device__ void for_each(int64_t first, const F& f) const {
    const bool by_feature = rows.stride == 1;
    for (int i = 0; i < ROWS_OF_WARP; ++i) {
      const int other = warp_index() + i * WARPS;
      const int row = by_feature ? other : lane_index(), feature = by_feature ? lane_index() : other;
      if (row < count && first + feature < rows.features) f(row, feature);
    }
  }

  __device__ void load(int64_t first, Tile& tile) const {
    for_each(first, [&](int row, int feature) {
      tile[row][feature] = load_element(rows, offsets[row] + (first + feature) * rows.stride);
    });
  }

  __device__ void store(int64_t first, const Tile& tile) const {
    for_each(first, [&](int row, int feature) {
      store_element(rows, offsets[row] + (first + feature) * rows.stride, tile[row][feature]);
    });
  }
};

// Returns rows [begin, end) as contiguous float32 [end - begin, D].
Tensor rows_in_float32(const Tensor& like, const Rows& rows, int64_t begin, int64_t end, const Device& device);
// Returns [..., D] as contiguous float32: the tensor itself if it has this form, else a copy.
Tensor in_float32(const char* name, const Tensor& tensor, const Device& device);

}  // namespace dlvae
