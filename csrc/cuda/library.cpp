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
  m.impl("one_hot", TORCH_BOX(&dlvae::cuda::one_hot));
  m.impl("gather_codes_fwd", TORCH_BOX(&dlvae::cuda::gather_codes_fwd));
}
