// Indices that come from the caller.
#pragma once

#include "tensors_cpu.h"

namespace dlvae {

// The indices as contiguous int64, in the order of the tensor's dimensions.
class Indices {
 public:
  // lowest: the smallest index in range; it is -1 where that stands for no code.
  Indices(const char* name, const Tensor& tensor, int64_t lowest = 0)
      : name_(name), tensor_(adjacent(name, tensor)), lowest_(lowest) {
    data = data_of<const int64_t>(tensor_);
    count = tensor_.numel();
  }
  // One index for each row of the tensor `rows_name`; -1 stands for no code.
  Indices(const char* name, const Tensor& tensor, const char* rows_name, const Rows& rows) : Indices(name, tensor, -1) {
    STD_TORCH_CHECK(
        count == rows.count, "expected one index for each of the ", rows.count, " vectors of ", rows_name, ", got ",
        count);
  }
  const int64_t* data;
  int64_t count;

  // Throws unless all indices at [begin, end) lie in [lowest, size).
  void check(int64_t begin, int64_t end, int64_t size) const {
    // The sign bit of `place` is set below `lowest`, the sign bit of `last - place` is set beyond `last`.
    const uint64_t lowest = static_cast<uint64_t>(lowest_), last = static_cast<uint64_t>(size - 1) - lowest;
    uint64_t bits = 0;
    for (int64_t i = begin; i < end; ++i) {
      const uint64_t place = static_cast<uint64_t>(data[i]) - lowest;
      bits |= place | (last - place);
    }
    if (bits >> 63 == 0) return;
    const int64_t index = *std::find_if(data + begin, data + end, [&](int64_t i) { return i < lowest_ || i >= size; });
    const char* const meaning = lowest_ < 0 ? " (-1 stands for no code)" : "";
    STD_TORCH_CHECK(false, "expected ", name_, " in [", lowest_, ", ", size, ")", meaning, ", got ", index);
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
  int64_t lowest_;
};

}  // namespace dlvae
