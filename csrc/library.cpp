// The private operations dlvae_native::, one for each dlvae:: operation that the compiled kernels can run.
#include <torch/csrc/stable/library.h>

#include "cpu/operations.h"
#include "schemas.h"

STABLE_TORCH_LIBRARY(dlvae_native, m) {
  dlvae::define_operations(m);
  m.def("cpu_name() -> str");
  m.def("cpu_names(bool all) -> str");
  m.def("search_rate() -> float");
}

STABLE_TORCH_LIBRARY_IMPL(dlvae_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_name", TORCH_BOX(&dlvae::cpu_name));
  m.impl("cpu_names", TORCH_BOX(&dlvae::cpu_names));
  m.impl("search_rate", TORCH_BOX(&dlvae::search_rate));
}

STABLE_TORCH_LIBRARY_IMPL(dlvae_native, CPU, m) {
  m.impl("nearest_code", TORCH_BOX(&dlvae::nearest_code));
  m.impl("uncertain_rows", TORCH_BOX(&dlvae::uncertain_rows));
  m.impl("vector_quantize_fwd", TORCH_BOX(&dlvae::vector_quantize_fwd));
  m.impl("one_hot", TORCH_BOX(&dlvae::one_hot));
  m.impl("gather_codes_fwd", TORCH_BOX(&dlvae::gather_codes_fwd));
  m.impl("gather_codes_bwd", TORCH_BOX(&dlvae::gather_codes_bwd));
  m.impl("vector_quantize_bwd", TORCH_BOX(&dlvae::vector_quantize_bwd));
  m.impl("ema_statistics", TORCH_BOX(&dlvae::ema_statistics));
  m.impl("ema_step", TORCH_BOX(&dlvae::ema_step));
  m.impl("sparse_decode_fwd", TORCH_BOX(&dlvae::sparse_decode_fwd));
  m.impl("sparse_decode_bwd", TORCH_BOX(&dlvae::sparse_decode_bwd));
  m.impl("topk_codes", TORCH_BOX(&dlvae::topk_codes));
  m.impl("kept_softmax_fwd", TORCH_BOX(&dlvae::kept_softmax_fwd));
  m.impl("kept_softmax_bwd", TORCH_BOX(&dlvae::kept_softmax_bwd));
}
