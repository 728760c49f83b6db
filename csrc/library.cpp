// The private operations dlvae_native::, one for each dlvae:: operation that the compiled kernels can run.
#include <torch/csrc/stable/library.h>

#include "cpu/operations.h"

STABLE_TORCH_LIBRARY(dlvae_native, m) {
  m.def("cpu_name() -> str");
  m.def("topk_codes(Tensor x, Tensor dictionary, int k, str metric, Tensor? bias) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(dlvae_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_name", TORCH_BOX(&dlvae::cpu_name));
}

STABLE_TORCH_LIBRARY_IMPL(dlvae_native, CPU, m) {
  m.impl("topk_codes", TORCH_BOX(&dlvae::topk_codes));
}
