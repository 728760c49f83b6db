// Helpers between tensors and plain pointers that the wrappers of all operations use.
#pragma once

#include <algorithm>
#include <exception>
#include <memory>
#include <mutex>

#include "../tensors.h"
#include "kernels.h"

namespace dlvae {

inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type = ScalarType::Float) {
  Tensor tensor = torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape), type);
  prefer_large_pages(tensor.data_ptr(), tensor.numel() * static_cast<int64_t>(tensor.element_size()));
  return tensor;
}

// The same as torch.empty_like: dense strides are kept.
inline Tensor new_like(const Tensor& like) {
  Tensor tensor = torch::stable::empty_like(like);
  prefer_large_pages(tensor.data_ptr(), tensor.numel() * static_cast<int64_t>(tensor.element_size()));
  return tensor;
}

struct Release {
  void operator()(void* memory) const { release(memory); }
};
// An uninitialised array.
template <class T>
using Array = std::unique_ptr<T[], Release>;
template <class T>
Array<T> new_array(int64_t count) {
  return Array<T>(static_cast<T*>(allocate(count * static_cast<int64_t>(sizeof(T)))));
}

// A tensor [..., D] as contiguous float32 rows: the memory of the tensor itself if it has this form, else a copy.
class Matrix {
 public:
  Matrix(const char* name, const Tensor& tensor);
  const float* data;
  int64_t rows, features;

 private:
  Tensor copy_;
};

// Calls f(begin, end) over [0, count) on torch's threads, at least `grain` elements at a time. An exception of a thread
// is rethrown in the caller.
template <class F>
void parallel(int64_t count, int64_t grain, const F& f) {
  std::exception_ptr error;
  std::mutex mutex;
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, grain), [&](int64_t begin, int64_t end) {
    try {
      f(begin, end);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace dlvae
