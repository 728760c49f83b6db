// AVX-512 with VNNI: sums of 16-bit products.
#include "target.h"

#if defined(DLVAE_X86)
BEGIN_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#define DLVAE_AVX2
#define DLVAE_AVX512
#define DLVAE_VNNI
#include "../kernels/table.h"

const dlvae::Kernels& dlvae::vnni_kernels() {
  static const Kernels table = make_table("vnni");
  return table;
}
END_TARGET
#endif
