// The table of kernels: one for each instruction set, chosen when an operation first runs.
#pragma once

#include <stdint.h>

#include "codebook.h"
#include "rows.h"
#include "softmax.h"
#include "topk.h"

namespace dlvae {

struct Kernels {
  const char* name;
  int panel;  // codes that are packed side by side
  int rows;   // that one tile of a product holds

  // Rows [begin, end) to float32 at to[., ld], and back.
  void (*load_rows)(const Rows& rows, int64_t begin, int64_t end, float* to, int64_t ld);
  void (*store_rows)(const Rows& rows, int64_t begin, int64_t end, const float* from, int64_t ld);

  // Squared lengths of codes [begin, end) of `features` each.
  void (*square_codes)(const float* codes, int64_t begin, int64_t end, int64_t features, double* squares);
  void (*pack_topk)(const Topk& topk, int64_t begin, int64_t end, float* panels);  // panels [begin, end)
  void (*topk_rows)(const Topk& topk, int64_t begin, int64_t end);

  void (*pack_weight)(const float* weight, int64_t codes, int64_t features, int64_t begin, int64_t end, float* panels);
  void (*pack_weight_columns)(
      const float* weight, int64_t codes, int64_t features, int64_t begin, int64_t end, float* panels);
  void (*kept_softmax_rows)(const KeptSoftmax& softmax, int64_t begin, int64_t end);
  void (*kept_softmax_grad_rows)(const KeptSoftmaxBackward& backward, int64_t origin, int64_t begin, int64_t end);
  void (*kept_softmax_grad_codes)(const KeptSoftmaxBackward& backward, int64_t count, int64_t begin, int64_t end);
  void (*unpack_weight)(const KeptSoftmaxBackward& backward, int64_t begin, int64_t end, float* weight);
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
