// The table of kernels. There is one for each instruction set; it is chosen at each call.
#pragma once

#include <stdint.h>

#include "../rows.h"
#include "codebook.h"
#include "entropy.h"
#include "residual.h"
#include "segments.h"
#include "softmax.h"
#include "topk.h"

#if defined(__x86_64__)
#define DLVAE_X86
#endif

namespace dlvae {

struct Kernels {
  const char* name;
  int panel;  // number of codes that are packed side by side
  int rows;   // number of rows in one tile of a product

  // Converts rows [begin, end) to float32 at to[., ld], and back.
  void (*load_rows)(const Rows& rows, int64_t begin, int64_t end, float* to, int64_t ld);
  void (*store_rows)(const Rows& rows, int64_t begin, int64_t end, const float* from, int64_t ld);

  // Finds the nearest of codes [begin, end) for each of at most FEW_ROWS rows x[count, ld]; see search_few.
  void (*search_few)(
      const Codebook& book, const float* x, int64_t ld, int64_t count, int64_t begin, int64_t end, Found* found);

  // A codebook is measured code by code and packed panel by panel into arrays of `packed_steps` words.
  int64_t (*packed_steps)(const Codebook& book);
  void (*measure_codes)(const Codebook& book, int64_t begin, int64_t end);
  void (*pack_panels)(const Codebook& book, int64_t begin, int64_t end);
  // Finds the nearest codes of rows [begin, end) and, unless null, the squared distances; begin is a multiple of BLOCK.
  // The results of row r are indices[r * step] and distances[r * step]. Returns the number of rows that were searched a
  // second time because rounding might have hidden the nearest code.
  int64_t (*search_rows)(
      const Codebook& book, const Rows& x, int64_t begin, int64_t end, int64_t step, int64_t* indices,
      float* distances);
  // The same as search_rows; also writes the nearest codes, (c - x) / 2 unless half_error has no data, and the sum of
  // (c - x)^2 over each block to losses[block]. A row r with a flag mask[r * step] that is not set has no code: its
  // index is -1, all else is 0. mask may be null.
  void (*quantize_rows)(
      const Codebook& book, const Rows& x, int64_t begin, int64_t end, int64_t step, int64_t* indices, const bool* mask,
      const Rows& quantized, const Rows& half_error, double* losses);
  // Residual quantization; see kernels/residual_kernel.h. The first returns the sum of squares of what is left.
  double (*quantize_residuals)(const Codebook& book, float* residuals, float* sums, int64_t count, int64_t* indices);
  void (*subtract_codes)(
      const float* codebook, const int64_t* indices, int64_t stride, int64_t count, int64_t features, float* rows);
  void (*residual_grad_rows)(const ResidualBackward& task, int64_t begin, int64_t end);
  // Computes scores of data in the first-level cache repeatedly; returns the number of products of two features.
  int64_t (*repeat_scores)(int64_t rounds);

  // Adds the part of the pairs of rows [begin, end) that belongs to `share` to sums[., ld], or overwrites these if
  // begin is 0. The rows are at data[., data_ld]. is_far: the rows are not in the core's cache. places: how far the
  // pairs of each code have been summed. totals [min(K, P / SUM_CHAIN + 1), features]: scratch memory for the codes
  // with more than SUM_CHAIN pairs, kept between calls.
  void (*sum_segments)(
      const Segments& segments, const Share& share, int64_t begin, int64_t end, const float* data, int64_t data_ld,
      bool is_far, int64_t* places, double* totals, float* sums, int64_t features, int64_t ld);
  // decode_rows writes rows [begin, end) of out, each a sum of k atoms weighted by values[., k]. atom_products writes
  // to values[., k] the inner products of each row with its atoms.
  void (*decode_rows)(const Atoms& atoms, const float* values, int64_t begin, int64_t end, const Rows& out);
  void (*atom_products)(const Atoms& atoms, const Rows& rows, int64_t begin, int64_t end, float* values);
  // Copies the codes that `indices` select to the contiguous rows [begin, end) of `to`; the index -1 gives zeros.
  void (*copy_rows)(const CodeRows& codes, const int64_t* indices, int64_t begin, int64_t end, char* to);
  // Updates codes [begin, end) of codebook and embed_sum from the statistics [K, D + 1]; a code with a positive size
  // becomes embed_sum / size.
  void (*ema_rows)(
      const Rows& codebook, const Rows& embed_sum, const Rows& statistics, const float* sizes, float weight,
      int64_t begin, int64_t end);
  // Computes rows [begin, end) of out = a - scale * b.
  void (*subtract_scaled)(const Rows& a, const Rows& b, float scale, const Rows& out, int64_t begin, int64_t end);
  // Computes rows [begin, end) of the gradient of x under the rotation trick.
  void (*rotate_rows)(const Rows& grad, const Rows& x, const Rows& q, const Rows& grad_x, int64_t begin, int64_t end);
  // Finds the k best of codes [begin, end) for each of at most FEW_ROWS rows x[count, ld]; see topk_few.
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
  void (*code_entropy_rows)(const CodeEntropy& entropy, int64_t begin, int64_t end, float* totals);
  void (*code_entropy_grad_rows)(const CodeEntropyBackward& backward, int64_t origin, int64_t begin, int64_t end);
};

// Returns the kernels in use: the fastest that this machine supports, or those that DLVAE_CPU names. Throws if
// DLVAE_CPU names none that can run.
const Kernels& kernels();

struct InstructionSet {
  const char* name;
  bool available;  // on this processor
  const Kernels& (*table)();
};

// All instruction sets that this library has kernels for, the fastest first.
const InstructionSet* instruction_sets(int* count);

const Kernels& portable_kernels();
#if defined(DLVAE_X86)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& vnni_kernels();
const Kernels& amx_kernels();
#endif

// Uninitialised scratch memory, aligned to 64 bytes. The kernels call these because they may not use the C++ library.
void* allocate(int64_t bytes);
void release(void* memory);

// Asks for large pages for memory that is about to be overwritten. The first access to each new page costs more than
// the kernels themselves, and large pages are fewer.
void prefer_large_pages(void* memory, int64_t bytes);

}  // namespace dlvae
