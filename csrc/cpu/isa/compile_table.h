// Compiles the kernels for an instruction set, and defines the function <ISA>_kernels() that returns their table.
//
// A file of this folder defines ISA, TARGET (the compiler's names of the extensions) and the highest of DLVAE_AVX2,
// DLVAE_AVX512, DLVAE_VNNI and DLVAE_AMX, which the kernels ask for: a target in the source does not define macros such
// as __AVX2__, as compiler options do.
#include "../kernels.h"

#if defined(DLVAE_AMX)
#define DLVAE_VNNI
#endif
#if defined(DLVAE_VNNI)
#define DLVAE_AVX512
#endif
#if defined(DLVAE_AVX512)
#define DLVAE_AVX2
#endif

#define PRAGMA(text) _Pragma(#text)
#define EXPANDED(macro, argument) macro(argument)
#define NAME(isa) #isa
#define FUNCTION(isa) isa##_kernels

#if defined(DLVAE_X86)
#if defined(__clang__)
// The intrinsics declare their own targets, so Clang needs the header before the attribute.
#include <immintrin.h>
#define BEGIN_TARGET(features) PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#else
#define BEGIN_TARGET(features) PRAGMA(GCC target(features))
#define END_TARGET
#endif

BEGIN_TARGET(TARGET)
#include "../kernels/table.h"

const dlvae::Kernels& dlvae::EXPANDED(FUNCTION, ISA)() {
  static const Kernels table = make_table(EXPANDED(NAME, ISA));
  return table;
}
END_TARGET
#endif
