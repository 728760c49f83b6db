// AVX2 with FMA.
#include "../kernels.h"

#if defined(DLVAE_X86)
#if defined(__clang__)
// The intrinsics declare their own targets, so Clang needs the header before the attribute.
#include <immintrin.h>
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
// A target in the source does not define macros such as __AVX2__; only compiler options do.
#define DLVAE_AVX2
#include "../kernels/table.h"

const dlvae::Kernels& dlvae::avx2_kernels() {
  static const Kernels table = make_table("avx2");
  return table;
}

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
