// AVX2 with FMA.
#include "../kernels.h"

#if defined(DLVAE_X86)
#pragma GCC target("avx2,fma,f16c")
// The compiler defines its own macros from options alone.
#define DLVAE_AVX2
#include "../kernels/table.h"

const dlvae::Kernels& dlvae::avx2_kernels() {
  static const Kernels table = make_table("avx2");
  return table;
}
#endif
