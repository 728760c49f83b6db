// AVX2 with FMA.
#include "target.h"

#if defined(DLVAE_X86)
BEGIN_TARGET("avx2,fma,f16c")
#define DLVAE_AVX2
#include "../kernels/table.h"

const dlvae::Kernels& dlvae::avx2_kernels() {
  static const Kernels table = make_table("avx2");
  return table;
}
END_TARGET
#endif
