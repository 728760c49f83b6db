// The table of kernels: one for each instruction set, chosen when an operation first runs.
#pragma once

#include <stdint.h>

#include "codebook.h"
#include "rows.h"

// Clang does not know `#pragma GCC target`: what it compiles is portable alone.
#if defined(__x86_64__) && !defined(__clang__)
#define DLVAE_X86
#endif

namespace dlvae {

struct Kernels {
  const char* name;
  int panel;  // codes that are packed side by side

  // Rows [begin, end) to float32 at to[., ld], and back.
  void (*load_rows)(const Rows& rows, int64_t begin, int64_t end, float* to, int64_t ld);
  void (*store_rows)(const Rows& rows, int64_t begin, int64_t end, const float* from, int64_t ld);
};

// Those in use: the best that this machine has, or what DLVAE_CPU names. Throws where it names none that can run.
const Kernels& kernels();

struct InstructionSet {
  const char* name;
  bool available;  // on this processor
  const Kernels& (*table)();
};

// All that this library has kernels for, from the best to the plainest.
const InstructionSet* instruction_sets(int* count);

const Kernels& portable_kernels();
#if defined(DLVAE_X86)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& vnni_kernels();
#endif

// Of a thread's own, without initial values; beyond the kernels' reach of the C++ library.
void* allocate(int64_t bytes);
void release(void* memory);

}  // namespace dlvae
