// The AVX-512 subsets that every server processor with AVX-512 has.
#include "target.h"

#if defined(DLVAE_X86)
BEGIN_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#define DLVAE_AVX2
#define DLVAE_AVX512
#include "../kernels/table.h"

const dlvae::Kernels& dlvae::avx512_kernels() {
  static const Kernels table = make_table("avx512");
  return table;
}
END_TARGET
#endif
