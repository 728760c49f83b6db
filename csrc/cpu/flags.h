// Optional flags that come from the caller.
#pragma once

#include <optional>

#include "tensors_cpu.h"

namespace dlvae {

// Flags of any strides; all are set where there is no tensor.
class Flags {
 public:
  Flags(const char* name, const std::optional<Tensor>& flags, const std::vector<int64_t>& shape) {
    if (!flags.has_value()) return;
    check_device(name, *flags);
    STD_TORCH_CHECK(
        flags->scalar_type() == ScalarType::Bool && shape_of(*flags) == shape, "expected ", name, " of shape ",
        shape_text(shape), " and dtype bool, got ", shape_text(*flags), " and ",
        torch::headeronly::toString(flags->scalar_type()));
    copy_ = torch::stable::contiguous(*flags);
    data_ = data_of<const bool>(copy_);
  }
  // Null where there is no tensor.
  const bool* data() const { return data_; }
  bool operator[](int64_t i) const { return data_ == nullptr || data_[i]; }

 private:
  Tensor copy_;
  const bool* data_ = nullptr;
};

}  // namespace dlvae
