// Indices that come from the caller.
#pragma once

#include "tensors_cpu.h"

namespace dlvae {

// The indices as contiguous int64, in the order of the tensor's dimensions.
class Indices {
 public:
  Indices(const char* name, const Tensor& tensor) : name_(name), tensor_(adjacent(name, tensor)) {
    data = data_of<const int64_t>(tensor_);
    count = tensor_.numel();
  }
  const int64_t* data;
  int64_t count;

  // Throws unless all indices at [begin, end) lie in [lowest, size), where lowest is 0 or -1.
  void check(int64_t begin, int64_t end, int64_t size, int64_t lowest = 0) const {
    // The sign bit of `index - lowest` is set below lowest, the sign bit of `last - index` is set beyond `last`.
    const uint64_t last = static_cast<uint64_t>(size - 1);
    uint64_t bits = 0;
    for (int64_t i = begin; i < end; ++i) {
      const uint64_t index = static_cast<uint64_t>(data[i]);
      bits |= (index - lowest) | (last - index);
    }
    if (bits >> 63 == 0) return;
    const int64_t index = *std::find_if(data + begin, data + end, [=](int64_t i) { return i < lowest || i >= size; });
    STD_TORCH_CHECK(false, "expected ", name_, " in [", lowest, ", ", size, "), got ", index);
  }

 private:
  static Tensor adjacent(const char* name, const Tensor& tensor) {
    check_device(name, tensor);
    STD_TORCH_CHECK(
        tensor.scalar_type() == ScalarType::Long, "expected ", name, " of dtype int64, got ",
        torch::headeronly::toString(tensor.scalar_type()));
    return torch::stable::contiguous(tensor);
  }

  const char* name_;
  Tensor tensor_;
};

}  // namespace dlvae
