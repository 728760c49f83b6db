#include "tensors_cpu.h"

namespace dlvae {

void check_device(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cpu(), "expected ", name, " on the CPU, got a tensor on another device");
}

Matrix::Matrix(const char* name, const Tensor& tensor) {
  const Rows view = rows_of(name, tensor);
  rows = view.count;
  features = view.features;
  if (is_contiguous(view)) {
    copy_ = tensor;
    data = data_of<const float>(tensor);
    return;
  }
  copy_ = new_tensor(tensor, {rows, features});
  float* out = data_of<float>(copy_);
  data = out;
  const Kernels& k = kernels();
  parallel(rows, 1 + 32768 / std::max<int64_t>(1, features), [&](int64_t begin, int64_t end) {
    k.load_rows(view, begin, end, out + begin * features, features);
  });
}

}  // namespace dlvae
