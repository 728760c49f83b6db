#pragma once

#include "tensors.h"

namespace dlvae {

// That a codebook is [K, D] with the D of rows x.
void check_codebook(const Tensor& codebook, const Rows& x);

// A codebook [K, D], measured and packed for the searches of one call; only measured for so few rows that packing would
// take longer than to compare them with each code as it is.
class PackedCodebook {
 public:
  PackedCodebook(const Kernels& kernels, const Tensor& codebook, int64_t rows);
  const Codebook& book() const { return book_; }

 private:
  Matrix codes_;
  Codebook book_{};
  Array<float> peaks_, losses_, start_;
  Array<double> norms_;
  Array<uint32_t> words_;
};

}  // namespace dlvae
