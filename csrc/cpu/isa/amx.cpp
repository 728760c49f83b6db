// AVX-512 with matrix tiles for products of bfloat16.
#include "../kernels.h"

#if defined(DLVAE_X86)
#if defined(__clang__)
// The intrinsics have targets of their own: Clang needs their header before the attribute.
#include <immintrin.h>
#pragma clang attribute push( \
    __attribute__(( \
        target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,amx-tile,amx-bf16"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,amx-tile,amx-bf16")
#endif
// A compiler defines macros like __AVX2__ for its options, not for a target that the source names.
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
