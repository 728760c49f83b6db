// AVX-512 with matrix tiles (AMX) for bfloat16 products.
#include "../kernels.h"

#if defined(DLVAE_X86)
#if defined(__clang__)
// The intrinsics declare their own targets, so Clang needs the header before the attribute.
#include <immintrin.h>
#pragma clang attribute push( \
    __attribute__(( \
        target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,amx-tile,amx-bf16"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,amx-tile,amx-bf16")
#endif
// A target in the source does not define macros such as __AVX2__; only compiler options do.
#define DLVAE_AVX2
#define DLVAE_AVX512
#define DLVAE_VNNI
#define DLVAE_AMX
#include "../kernels/table.h"

const dlvae::Kernels& dlvae::amx_kernels() {
  static const Kernels table = make_table("amx");
  return table;
}

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
