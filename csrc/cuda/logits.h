// The logits x W^T + b of a softmax, for a chunk of rows at a time, and products with their gradients.
#pragma once

#include <algorithm>
#include <optional>

#include "products.h"

namespace dlvae {

// The logits of rows, a chunk of rows at a time.
class Logits {
 public:
  Logits(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Device& device);

  // Calls f(begin, count, logits [count, K]) for all rows in order. f may overwrite the logits.
  template <class F>
  void for_chunks(const F& f) const {
    float* const out = data_of<float>(data_);
    const Affine affine{bias_.numel() > 0 ? data_of<float>(bias_) : nullptr, 1, false, false};
    for (int64_t begin = 0; begin < rows.count; begin += chunk_) {
      const int64_t end = std::min(begin + chunk_, rows.count);
      const PackedRows part = products(like_, rows, begin, end, packed_, affine, out, codes.count, device_);
      repair_products(rows, begin, part, codes, packed_, affine, out, codes.count, device_);
      f(begin, end - begin, out);
    }
  }

 private:
  Tensor like_;
  const Device& device_;

 public:
  const Rows rows, codes;

 private:
  PackedCodes packed_;
  int64_t chunk_;
  Tensor data_, bias_;
};

// The gradients of x and weight, added up from those of the logits.
class LogitGradients {
 public:
  LogitGradients(
      const Tensor& x, const Tensor& weight, const Logits& logits, bool need_x, bool need_weight, const Device& device);
  // Adds the gradients of the logits of rows [begin, begin + count), [count, K].
  void add(int64_t begin, int64_t count, float* logits);
  Tensor grad_x, grad_weight;  // of the shapes of x and weight; empty where not needed

 private:
  Tensor like_;
  const Logits& logits_;
  const Device& device_;
  const bool need_x_, need_weight_;
  const Rows atoms_;
  std::optional<PackedCodes> packed_atoms_;
};

// sums[k] += sum of values[row, k] over the rows, in the same order at each run.
void add_columns(const float* values, int64_t rows, int64_t columns, float* sums, const Device& device);

}  // namespace dlvae
