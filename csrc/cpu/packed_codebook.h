#pragma once

#include "tensors_cpu.h"

namespace dlvae {

// Throws unless the codebook is [K, D] with the D of rows x.
void check_codebook(const Tensor& codebook, const Rows& x);

// A codebook [K, D], measured and packed for the searches of one call. For at most FEW_ROWS rows x, it holds their
// nearest codes instead, which one pass over the unpacked codes finds.
class PackedCodebook {
 public:
  PackedCodebook(const Kernels& kernels, const Tensor& codebook, const Rows& x);
  const Codebook& book() const { return book_; }

 private:
  void find(const Kernels& kernels, const Rows& x);
  void measure(const Kernels& kernels);
  bool centre();
  void leave_out_repeated();
  void pack(const Kernels& kernels);

  Matrix codes_;
  Codebook book_{};
  Array<Found> found_;
  Array<float> centre_, centred_, peaks_, losses_, start_;
  Array<double> norms_;
  Array<uint32_t> hashes_, words_;
};

}  // namespace dlvae
