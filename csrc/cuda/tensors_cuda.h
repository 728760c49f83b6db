// Helpers for tensors on a GPU that the wrappers of all operations use.
#pragma once

#include <algorithm>

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

// The most heads of a codebook: the limit of two dimensions of a grid.
constexpr int64_t MOST_HEADS = 65535;

// Returns the number of heads of a codebook: H of [H, K, D], and 1 of [K, D].
inline int64_t heads_of(const Tensor& codebook) { return codebook.dim() == 3 ? codebook.size(0) : 1; }

// Returns the rows of a codebook [K, D], or [H, K, D] if `has_heads`, after checking that D is that of x.
inline Rows codes_of(const char* name, const Tensor& codes, const Rows& x, bool has_heads = false) {
  STD_TORCH_CHECK(
      codes.dim() == 2 || (has_heads && codes.dim() == 3), "expected ", name, " of shape [K, D]",
      has_heads ? " or [H, K, D]" : "", ", got ", shape_text(codes));
  STD_TORCH_CHECK(
      heads_of(codes) <= MOST_HEADS, "expected ", name, " of at most ", MOST_HEADS, " heads, got ", heads_of(codes));
  const Rows rows = rows_of(name, codes);
  STD_TORCH_CHECK(rows.count >= 1, "expected ", name, " of shape [K, D] with K >= 1, got ", shape_text(codes));
  STD_TORCH_CHECK(rows.count < INT32_MAX, "expected ", name, " of at most ", INT32_MAX - 1, " codes, got ", rows.count);
  STD_TORCH_CHECK(
      rows.features == x.features, "expected x of D = ", rows.features, " features as in ", name, ", got ", x.features);
  return rows;
}

// Returns the vectors of x [..., H, D] head by head: all of the first head, then all of the next.
inline Rows rows_by_head(const char* name, const Tensor& x, int64_t heads) {
  std::vector<int64_t> order(x.dim());
  std::iota(order.begin(), order.end(), 0);
  STD_TORCH_CHECK(
      heads == 1 || (x.dim() >= 2 && x.size(-2) == heads), "expected ", name, " of shape [..., H, D] with H = ", heads,
      " as in codebook, got ", shape_text(x));
  if (heads > 1) std::rotate(order.begin(), order.end() - 2, order.end() - 1);
  return rows_of(name, x, order);
}

// Returns a mask of the vectors of x as contiguous flags.
inline Tensor mask_of(const char* name, const Tensor& mask, const Rows& x) {
  check_device(name, mask);
  STD_TORCH_CHECK(
      mask.scalar_type() == ScalarType::Bool && mask.numel() == x.count, "expected ", name,
      " of dtype bool with one element for each of the ", x.count, " vectors of x, got shape ", shape_text(mask),
      " and dtype ", torch::headeronly::toString(mask.scalar_type()));
  return torch::stable::contiguous(mask);
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
