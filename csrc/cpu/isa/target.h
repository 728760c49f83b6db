// Compiles the functions between BEGIN_TARGET and END_TARGET for an instruction set.
//
// A target in the source does not define macros such as __AVX2__, as compiler options do: the kernels ask for
// DLVAE_AVX2, DLVAE_AVX512, DLVAE_VNNI and DLVAE_AMX.
#pragma once

#include "../kernels.h"

#define PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#if defined(DLVAE_X86)
// The intrinsics declare their own targets, so Clang needs the header before the attribute.
#include <immintrin.h>
#endif
#define BEGIN_TARGET(features) PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#else
#define BEGIN_TARGET(features) PRAGMA(GCC target(features))
#define END_TARGET
#endif
