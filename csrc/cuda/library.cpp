// The CUDA kernels of the operations that schemas.h defines.
#include <torch/csrc/stable/library.h>

#include "operations.h"

#if defined(DLVAE_EMULATE_CUDA)
#include "../schemas.h"

STABLE_TORCH_LIBRARY(dlvae_emulated, m) { dlvae::define_operations(m); }

STABLE_TORCH_LIBRARY_IMPL(dlvae_emulated, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(dlvae_native, CUDA, m) {
#endif
  m.impl("nearest_code", TORCH_BOX(&dlvae::cuda::nearest_code));
  m.impl("uncertain_rows", TORCH_BOX(&dlvae::cuda::uncertain_rows));
  m.impl("topk_codes", TORCH_BOX(&dlvae::cuda::topk_codes));
  m.impl("one_hot", TORCH_BOX(&dlvae::cuda::one_hot));
  m.impl("gather_codes_fwd", TORCH_BOX(&dlvae::cuda::gather_codes_fwd));
  m.impl("gather_codes_bwd", TORCH_BOX(&dlvae::cuda::gather_codes_bwd));
  m.impl("vector_quantize_fwd", TORCH_BOX(&dlvae::cuda::vector_quantize_fwd));
  m.impl("vector_quantize_bwd", TORCH_BOX(&dlvae::cuda::vector_quantize_bwd));
  m.impl("ema_statistics", TORCH_BOX(&dlvae::cuda::ema_statistics));
  m.impl("ema_step", TORCH_BOX(&dlvae::cuda::ema_step));
  m.impl("sparse_decode_fwd", TORCH_BOX(&dlvae::cuda::sparse_decode_fwd));
  m.impl("sparse_decode_bwd", TORCH_BOX(&dlvae::cuda::sparse_decode_bwd));
  m.impl("kept_softmax_fwd", TORCH_BOX(&dlvae::cuda::kept_softmax_fwd));
  m.impl("kept_softmax_bwd", TORCH_BOX(&dlvae::cuda::kept_softmax_bwd));
}
