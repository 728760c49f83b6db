// Between tensors and plain pointers: what every wrapper of an operation uses.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <mutex>
#include <numeric>
#include <vector>

#include "kernels.h"

namespace dlvae {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Type type_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Type::float32;
    case ScalarType::BFloat16: return Type::bfloat16;
    case ScalarType::Half: return Type::float16;
    default: break;
  }
  STD_TORCH_CHECK(false, name, " has a dtype that is not float32, bfloat16 or float16");
}

inline void check_cpu(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " is not on the CPU");
}

// x [..., D], whatever its strides; its dimensions are taken in that order, the features last.
inline Rows rows_of(const char* name, const Tensor& x, const std::vector<int64_t>& order) {
  check_cpu(name, x);
  STD_TORCH_CHECK(x.dim() >= 1, name, " has no dimensions; it needs [..., D]");
  const int64_t last = order.back();
  Rows rows{};
  rows.data = x.data_ptr();
  rows.type = type_of(name, x);
  rows.features = x.size(last);
  // A single feature is adjacent to itself.
  rows.stride = rows.features == 1 ? 1 : x.stride(last);
  rows.count = 1;
  rows.dims = 0;
  for (const int64_t i : order) {
    if (i == last) break;
    const int64_t size = x.size(i), stride = x.stride(i);
    rows.count *= size;
    if (size == 1) continue;
    if (rows.dims > 0 && rows.strides[rows.dims - 1] == stride * size) {
      rows.sizes[rows.dims - 1] *= size;
      rows.strides[rows.dims - 1] = stride;
      continue;
    }
    STD_TORCH_CHECK(
        rows.dims < Rows::MAX_DIMS, name, " has more than ", Rows::MAX_DIMS, " dimensions of rows that do not join");
    rows.sizes[rows.dims] = size;
    rows.strides[rows.dims++] = stride;
  }
  if (rows.dims == 0) {
    rows.sizes[0] = rows.count;
    rows.strides[0] = rows.features;
    rows.dims = 1;
  }
  return rows;
}

inline Rows rows_of(const char* name, const Tensor& x) {
  std::vector<int64_t> order(x.dim());
  std::iota(order.begin(), order.end(), 0);
  return rows_of(name, x, order);
}

inline std::vector<int64_t> shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return std::vector<int64_t>(sizes.begin(), sizes.end());
}

// [..., last] with the leading dimensions of x [..., D].
inline std::vector<int64_t> shape_with(const Tensor& x, std::initializer_list<int64_t> last) {
  std::vector<int64_t> shape = shape_of(x);
  shape.pop_back();
  shape.insert(shape.end(), last);
  return shape;
}

inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type = ScalarType::Float) {
  Tensor tensor = torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape), type);
  prefer_large_pages(tensor.data_ptr(), tensor.numel() * static_cast<int64_t>(tensor.element_size()));
  return tensor;
}

// As torch.empty_like: dense strides are kept.
inline Tensor new_like(const Tensor& like) {
  Tensor tensor = torch::stable::empty_like(like);
  prefer_large_pages(tensor.data_ptr(), tensor.numel() * static_cast<int64_t>(tensor.element_size()));
  return tensor;
}

struct Release {
  void operator()(void* memory) const { release(memory); }
};
// Numbers without initial values.
template <class T>
using Array = std::unique_ptr<T[], Release>;
template <class T>
Array<T> new_array(int64_t count) {
  return Array<T>(static_cast<T*>(allocate(count * static_cast<int64_t>(sizeof(T)))));
}

// Tensor [..., D] as adjacent float32 rows: the tensor itself where it is that.
class Matrix {
 public:
  Matrix(const char* name, const Tensor& tensor);
  const float* data;
  int64_t rows, features;

 private:
  Tensor copy_;
};

// f(begin, end) over [0, count) on torch's threads, at least `grain` at a time; what one of them throws is thrown here.
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
