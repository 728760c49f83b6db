// Tensors of a GPU: what every wrapper of an operation uses.
#pragma once

#include "../tensors.h"

namespace dlvae::cuda {

// Scratch memory too is torch's: what is freed serves only what comes later on the stream, and graphs keep it.
inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type = ScalarType::Float) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape), type);
}

// As adjacent numbers, in the order of the tensor's dimensions. They may lie out of range: a kernel looks before it
// uses one, as asking here would wait for the GPU.
inline Tensor indices_of(const char* name, const Tensor& tensor) {
  check_device(name, tensor);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Long, name, " have a dtype that is not int64");
  return torch::stable::contiguous(tensor);
}

}  // namespace dlvae::cuda
