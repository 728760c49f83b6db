// Registration of the CUDA kernels.
#include "../operations.h"

#if defined(DLVAE_EMULATE_CUDA)
STABLE_TORCH_LIBRARY(dlvae_emulated, m) { dlvae::define_operations(m); }

STABLE_TORCH_LIBRARY_IMPL(dlvae_emulated, CPU, m) { dlvae::implement_operations(m); }
#else
STABLE_TORCH_LIBRARY_IMPL(dlvae_native, CUDA, m) { dlvae::implement_operations(m); }
#endif
