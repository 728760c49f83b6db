// The private operations dlvae_native::, one for each dlvae:: operation that the compiled kernels can run.
#include <torch/csrc/stable/library.h>

#include "cpu/operations.h"

STABLE_TORCH_LIBRARY(dlvae_native, m) {
  m.def("cpu_name() -> str");
  m.def("cpu_names(bool all) -> str");
  m.def("nearest_code(Tensor x, Tensor codebook, bool return_distance, str precision) -> (Tensor, Tensor)");
  m.def("uncertain_rows(Tensor x, Tensor codebook) -> int");
  m.def(
      "vector_quantize_fwd(Tensor x, Tensor codebook, bool need_error, str precision)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(dlvae_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_name", TORCH_BOX(&dlvae::cpu_name));
  m.impl("cpu_names", TORCH_BOX(&dlvae::cpu_names));
}

STABLE_TORCH_LIBRARY_IMPL(dlvae_native, CPU, m) {
  m.impl("nearest_code", TORCH_BOX(&dlvae::nearest_code));
  m.impl("uncertain_rows", TORCH_BOX(&dlvae::uncertain_rows));
  m.impl("vector_quantize_fwd", TORCH_BOX(&dlvae::vector_quantize_fwd));
}
