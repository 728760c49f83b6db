// AVX-512 with matrix tiles for products of bfloat16.
#include "../kernels.h"

#if defined(DLVAE_X86)
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,amx-tile,amx-bf16")
// The compiler defines its own macros from options alone.
#define DLVAE_AVX2
#define DLVAE_AVX512
#define DLVAE_VNNI
#define DLVAE_AMX
#include "../kernels/table.h"

const dlvae::Kernels& dlvae::amx_kernels() {
  static const Kernels table = make_table("amx");
  return table;
}
#endif
