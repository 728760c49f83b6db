// Rows in the form that the kernels compute with: float32 with adjacent features.
#pragma once

#include "buffer.h"
#include "rows_kernel.h"

namespace {

// A few rows at a time in float32, `ld` elements apart: the memory of the rows themselves if they are dense, else a
// copy.
class DenseRows {
 public:
  // Holds at most `most` rows at a time. If `contiguous`, rows with gaps between them are copied as well.
  DenseRows(const Rows& rows, int64_t most, bool contiguous = false)
      : rows_(rows),
        in_place_(contiguous ? is_contiguous(rows) : is_dense(rows)),
        ld_(in_place_ ? rows.strides[0] : rows.features),
        copy_(in_place_ ? 0 : most * ld_) {}
  int64_t ld() const { return ld_; }

  // Returns rows [begin, end).
  float* load(int64_t begin, int64_t end) {
    if (!in_place_) load_rows(rows_, begin, end, copy_, ld_);
    return at(begin);
  }
  // Returns the memory for rows [begin, ...), which `store` writes back.
  float* at(int64_t begin) { return in_place_ ? (float*)rows_.data + begin * ld_ : (float*)copy_; }
  void store(int64_t begin, int64_t end) {
    if (!in_place_) store_rows(rows_, begin, end, copy_, ld_);
  }

 private:
  const Rows& rows_;
  const bool in_place_;
  const int64_t ld_;
  Buffer<float> copy_;
};

}  // namespace
