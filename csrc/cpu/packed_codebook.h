#pragma once

#include <memory>

#include "tensors.h"

namespace dlvae {

struct Release {
  void operator()(void* memory) const { release(memory); }
};
template <class T>
using Array = std::unique_ptr<T[], Release>;

template <class T>
Array<T> new_array(int64_t count) {
  return Array<T>(static_cast<T*>(allocate(count * static_cast<int64_t>(sizeof(T)))));
}

// A codebook [K, D], measured and packed for the searches of one call.
class PackedCodebook {
 public:
  PackedCodebook(const Kernels& kernels, const Tensor& codebook);
  const Codebook& book() const { return book_; }

 private:
  Matrix codes_;
  Codebook book_{};
  Array<float> peaks_, losses_, start_;
  Array<double> norms_;
  Array<uint32_t> words_;
};

}  // namespace dlvae
