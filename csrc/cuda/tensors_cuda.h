// Helpers for tensors on a GPU that the wrappers of all operations use.
#pragma once

#include "../tensors.h"

namespace dlvae {

// Scratch memory comes from torch, too: freed memory is reused later in stream order only, and CUDA graphs keep it.
inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type = ScalarType::Float) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape), type);
}

inline Tensor new_zeroed(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type = ScalarType::Float) {
  Tensor tensor = new_tensor(like, shape, type);
  torch::stable::zero_(tensor);
  return tensor;
}

// Returns the rows of a codebook [K, D] after checking that D is that of x.
inline Rows codes_of(const char* name, const Tensor& codes, const Rows& x) {
  STD_TORCH_CHECK(codes.dim() == 2, "expected ", name, " of shape [K, D], got ", shape_text(codes));
  const Rows rows = rows_of(name, codes);
  STD_TORCH_CHECK(rows.count >= 1, "expected ", name, " of shape [K, D] with K >= 1, got ", shape_text(codes));
  STD_TORCH_CHECK(rows.count < INT32_MAX, "expected ", name, " of at most ", INT32_MAX - 1, " codes, got ", rows.count);
  STD_TORCH_CHECK(
      rows.features == x.features, "expected x of D = ", rows.features, " features as in ", name, ", got ", x.features);
  return rows;
}

// Returns the address of one float32 number, which kernels read on the device.
inline const float* number_of(const char* name, const Tensor& tensor) {
  check_device(name, tensor);
  STD_TORCH_CHECK(
      tensor.numel() == 1 && tensor.scalar_type() == ScalarType::Float, "expected ", name,
      " to be one float32 number, got shape ", shape_text(tensor), " and dtype ",
      torch::headeronly::toString(tensor.scalar_type()));
  return data_of<float>(tensor);
}

// The same as torch.empty_like: dense strides are kept.
inline Tensor new_like(const Tensor& like) { return torch::stable::empty_like(like); }

// Returns the indices as contiguous int64, in the order of the tensor's dimensions. They may be out of range: kernels
// check each index before its use, because a check here would wait for the GPU.
inline Tensor indices_of(const char* name, const Tensor& tensor) {
  check_device(name, tensor);
  STD_TORCH_CHECK(
      tensor.scalar_type() == ScalarType::Long, "expected ", name, " of dtype int64, got ",
      torch::headeronly::toString(tensor.scalar_type()));
  return torch::stable::contiguous(tensor);
}

}  // namespace dlvae
