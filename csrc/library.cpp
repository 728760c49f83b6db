// The private operations dlvae_native::, one for each dlvae:: operation that the compiled kernels can run.
#include <torch/csrc/stable/library.h>

#include "cpu/operations.h"

STABLE_TORCH_LIBRARY(dlvae_native, m) {
  m.def("cpu_name() -> str");
  m.def("topk_codes(Tensor x, Tensor dictionary, int k, str metric, Tensor? bias) -> (Tensor, Tensor)");
  m.def("kept_softmax_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor indices) -> (Tensor, Tensor)");
  m.def(
      "kept_softmax_bwd(Tensor grad, Tensor values, Tensor sums, Tensor x, Tensor weight, Tensor? bias, Tensor indices,"
      " bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(dlvae_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_name", TORCH_BOX(&dlvae::cpu_name));
}

STABLE_TORCH_LIBRARY_IMPL(dlvae_native, CPU, m) {
  m.impl("topk_codes", TORCH_BOX(&dlvae::topk_codes));
  m.impl("kept_softmax_fwd", TORCH_BOX(&dlvae::kept_softmax_fwd));
  m.impl("kept_softmax_bwd", TORCH_BOX(&dlvae::kept_softmax_bwd));
}
