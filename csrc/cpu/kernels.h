// The table of kernels: one for each instruction set, chosen when an operation first runs.
#pragma once

#include <stdint.h>

#include "codebook.h"
#include "rows.h"
#include "segments.h"

namespace dlvae {

struct Kernels {
  const char* name;
  int panel;  // codes that are packed side by side

  // Rows [begin, end) to float32 at to[., ld], and back.
  void (*load_rows)(const Rows& rows, int64_t begin, int64_t end, float* to, int64_t ld);
  void (*store_rows)(const Rows& rows, int64_t begin, int64_t end, const float* from, int64_t ld);

  // What a share has of the pairs of rows [begin, end), which lie at data[., data_ld], is added to sums[., ld]; where
  // begin is 0, to nothing. is_far: rows come from beyond a core's cache. places: up to where each code has been summed.
  void (*sum_segments)(
      const Segments& segments, const Share& share, int64_t begin, int64_t end, const float* data, int64_t data_ld,
      bool is_far, int64_t* places, float* sums, int64_t features, int64_t ld);
  // Rows [begin, end) of out: sums of k atoms; and of values[., k]: inner products with them.
  void (*decode_rows)(const Atoms& atoms, const float* values, int64_t begin, int64_t end, const Rows& out);
  void (*atom_products)(const Atoms& atoms, const Rows& rows, int64_t begin, int64_t end, float* values);
  // Codes [begin, end) of both by the statistics [K, D + 1]; a code goes to embed_sum / size where that is above 0.
  void (*ema_rows)(
      const Rows& codebook, const Rows& embed_sum, const Rows& statistics, const float* sizes, float weight,
      int64_t begin, int64_t end);
  // Rows [begin, end) of out = a - scale * b.
  void (*subtract_scaled)(const Rows& a, const Rows& b, float scale, const Rows& out, int64_t begin, int64_t end);
};

// Those in use: the best that this machine has, or what DLVAE_CPU names. Throws where it names none that can run.
const Kernels& kernels();

const Kernels& portable_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& vnni_kernels();
#endif

// Of a thread's own, without initial values; beyond the kernels' reach of the C++ library.
void* allocate(int64_t bytes);
void release(void* memory);

}  // namespace dlvae
