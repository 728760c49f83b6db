// Helpers for tensors on any device that the wrappers of all operations use.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <numeric>
#include <string>
#include <vector>

#include "rows.h"

namespace dlvae {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

inline Type type_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Type::float32;
    case ScalarType::BFloat16: return Type::bfloat16;
    case ScalarType::Half: return Type::float16;
    default: break;
  }
  STD_TORCH_CHECK(
      false, "expected ", name, " of dtype float32, bfloat16 or float16, got ",
      torch::headeronly::toString(tensor.scalar_type()));
}

// Throws unless the tensor is on the device of this library.
void check_device(const char* name, const Tensor& tensor);

// Returns the rows of x [..., D] with any strides. The dimensions are taken in the given order, the features last.
inline Rows rows_of(const char* name, const Tensor& x, const std::vector<int64_t>& order) {
  check_device(name, x);
  STD_TORCH_CHECK(x.dim() >= 1, "expected ", name, " of shape [..., D], got a tensor without dimensions");
  const int64_t last = order.back();
  Rows rows{};
  rows.data = x.data_ptr();
  rows.type = type_of(name, x);
  rows.features = x.size(last);
  // A single feature is adjacent by definition.
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
        rows.dims < Rows::MAX_DIMS, "expected ", name, " with strides that merge its vectors into at most ",
        Rows::MAX_DIMS, " dimensions, got more: pass a contiguous tensor");
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

// Returns a shape as error messages show it: [2, 3].
inline std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text;
  for (const int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

inline std::string shape_text(const Tensor& tensor) { return shape_text(shape_of(tensor)); }

// Checks the coefficients and indices of the atoms of each row.
inline void check_atoms(const Tensor& values, const Tensor& indices, const Tensor& dictionary) {
  STD_TORCH_CHECK(
      values.dim() >= 1 && shape_of(values) == shape_of(indices),
      "expected values and indices of one shape [..., k], got ", shape_text(values), " and ", shape_text(indices));
  STD_TORCH_CHECK(
      dictionary.dim() == 2 && dictionary.size(0) >= 1 && dictionary.size(1) >= 1,
      "expected dictionary of shape [K, D] with K >= 1 and D >= 1, got ", shape_text(dictionary));
}

// Returns the shape [..., last] with the leading dimensions of x [..., D].
inline std::vector<int64_t> shape_with(const Tensor& x, std::initializer_list<int64_t> last) {
  std::vector<int64_t> shape = shape_of(x);
  shape.pop_back();
  shape.insert(shape.end(), last);
  return shape;
}

}  // namespace dlvae
