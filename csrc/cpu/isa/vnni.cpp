// AVX-512 with VNNI: sums of 16-bit products.
#include "../kernels.h"

#if defined(DLVAE_X86)
#if defined(__clang__)
// The intrinsics declare their own targets, so Clang needs the header before the attribute.
#include <immintrin.h>
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif
// A target in the source does not define macros such as __AVX2__; only compiler options do.
#define DLVAE_AVX2
#define DLVAE_AVX512
#define DLVAE_VNNI
#include "../kernels/table.h"

const dlvae::Kernels& dlvae::vnni_kernels() {
  static const Kernels table = make_table("vnni");
  return table;
}

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
