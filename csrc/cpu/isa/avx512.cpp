// AVX-512 as every server has it.
#include "../kernels.h"

#if defined(DLVAE_X86)
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
// The compiler defines its own macros from options alone.
#define DLVAE_AVX2
#define DLVAE_AVX512
#include "../kernels/table.h"

const dlvae::Kernels& dlvae::avx512_kernels() {
  static const Kernels table = make_table("avx512");
  return table;
}
#endif
