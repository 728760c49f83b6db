// AVX-512 with matrix tiles (AMX) for bfloat16 products.
#include "target.h"

#if defined(DLVAE_X86)
BEGIN_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,amx-tile,amx-bf16")
#define DLVAE_AVX2
#define DLVAE_AVX512
#define DLVAE_VNNI
#define DLVAE_AMX
#include "../kernels/table.h"

const dlvae::Kernels& dlvae::amx_kernels() {
  static const Kernels table = make_table("amx");
  return table;
}
END_TARGET
#endif
