// The table of kernels: one for each instruction set, chosen when an operation first runs.
#pragma once

#include <stdint.h>

#include "../rows.h"
#include "codebook.h"
#include "segments.h"
#include "softmax.h"
#include "topk.h"

#if defined(__x86_64__)
#define DLVAE_X86
#endif

namespace dlvae {

struct Kernels {
  const char* name;
  int panel;  // codes that are packed side by side
  int rows;   // that one tile of a product holds

  // Rows [begin, end) to float32 at to[., ld], and back.
  void (*load_rows)(const Rows& rows, int64_t begin, int64_t end, float* to, int64_t ld);
  void (*store_rows)(const Rows& rows, int64_t begin, int64_t end, const float* from, int64_t ld);

  // The nearest of codes [begin, end) to each of at most FEW_ROWS rows x[count, ld], as search_few says.
  void (*search_few)(
      const Codebook& book, const float* x, int64_t ld, int64_t count, int64_t begin, int64_t end, Found* found);

  // A codebook is measured, code by code, and packed, panel by panel, into arrays of `packed_steps` words.
  int64_t (*packed_steps)(const Codebook& book);
  void (*measure_codes)(const Codebook& book, int64_t begin, int64_t end);
  void (*pack_panels)(const Codebook& book, int64_t begin, int64_t end);
  // Nearest codes of rows [begin, end), their squared distances unless that is null; begin is a multiple of BLOCK.
  // Returns how many rows went through the codes a second time, since rounding might have hidden the nearest.
  int64_t (*search_rows)(
      const Codebook& book, const Rows& x, int64_t begin, int64_t end, int64_t* indices, float* distances);
  // As search_rows, and the codes themselves and, unless its data is null, (c - x) / 2; the sum of (c - x)^2 of each
  // block to losses[block].
  void (*quantize_rows)(
      const Codebook& book, const Rows& x, int64_t begin, int64_t end, int64_t* indices, const Rows& quantized,
      const Rows& half_error, double* losses);
  // The scores of what stays in the first cache, again and again; returns how many products of two features that took.
  int64_t (*repeat_scores)(int64_t rounds);

  // What a share has of the pairs of rows [begin, end), which lie at data[., data_ld], is added to sums[., ld]; where
  // begin is 0, to nothing. is_far: rows come from beyond a core's cache. places: how far each code has been summed.
  // totals [min(K, P / SUM_CHAIN + 1), features]: scratch of the codes with more than SUM_CHAIN pairs, kept between calls.
  void (*sum_segments)(
      const Segments& segments, const Share& share, int64_t begin, int64_t end, const float* data, int64_t data_ld,
      bool is_far, int64_t* places, double* totals, float* sums, int64_t features, int64_t ld);
  // Rows [begin, end) of out: sums of k atoms; and of values[., k]: inner products with them.
  void (*decode_rows)(const Atoms& atoms, const float* values, int64_t begin, int64_t end, const Rows& out);
  void (*atom_products)(const Atoms& atoms, const Rows& rows, int64_t begin, int64_t end, float* values);
  // Rows [begin, end) of to, adjacent: those that indices name, `stride` bytes apart.
  void (*copy_rows)(
      const char* from, int64_t stride, const int64_t* indices, int64_t begin, int64_t end, int64_t row_bytes,
      char* to);
  // Codes [begin, end) of both by the statistics [K, D + 1]; a code goes to embed_sum / size where that is above 0.
  void (*ema_rows)(
      const Rows& codebook, const Rows& embed_sum, const Rows& statistics, const float* sizes, float weight,
      int64_t begin, int64_t end);
  // Rows [begin, end) of out = a - scale * b.
  void (*subtract_scaled)(const Rows& a, const Rows& b, float scale, const Rows& out, int64_t begin, int64_t end);
  // The k best of codes [begin, end) for each of at most FEW_ROWS rows x[count, ld], as topk_few says.
  void (*topk_few)(
      const Topk& topk, const float* x, int64_t ld, int64_t count, int64_t begin, int64_t end, Exact* found);
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
const Kernels& amx_kernels();
#endif

// Of a thread's own, without initial values; beyond the kernels' reach of the C++ library.
void* allocate(int64_t bytes);
void release(void* memory);

// Of memory that is about to be written as a whole: where it is new, the first touch of each page costs more than all
// that the kernels do, and larger pages are fewer.
void prefer_large_pages(void* memory, int64_t bytes);

}  // namespace dlvae
