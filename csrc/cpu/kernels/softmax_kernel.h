// softmax(x W^T + b) at the kept codes, and its gradients.
//
// Logits are computed for a block of rows and a chunk of codes at a time. The backward pass recomputes them with the
// same products, so that they are bitwise equal.
#pragma once

#include "../softmax.h"
#include "buffer.h"
#include "exponential.h"
#include "product.h"
#include "rows_kernel.h"

namespace {

using dlvae::KeptSoftmax;
using dlvae::KeptSoftmaxBackward;

constexpr int64_t LOGITS = 512;  // number of codes in a chunk: whole panels and tiles

inline int64_t softmax_block(int64_t features) {
  const int64_t fitting = 65536 / features / ROWS * ROWS;
  return fitting < 2 * ROWS ? 2 * ROWS : fitting > 128 ? 128 : fitting;
}

// Rows of x [block, D], and their logits [block, LOGITS] for chunks of codes.
class LogitBlock {
 public:
  explicit LogitBlock(const KeptSoftmax& s)
      : s_(s), block(softmax_block(s.features)), x(block * s.features), logits(block * LOGITS) {}

  void load(int64_t first, int64_t count) {
    load_rows(s_.x, first, first + count, x, s_.features);
    for (int64_t i = count * s_.features; i < whole_tiles(count) * s_.features; ++i) x[i] = 0;
  }

  void find(int64_t count, int64_t first_code, int64_t codes) {
    multiply(
        (const float*)x, RowMajor{s_.features}, count, s_.panels + first_code * s_.features, s_.features * PANEL,
        panels_of(codes), s_.features, logits, LOGITS, s_.start + first_code, false);
  }

 private:
  const KeptSoftmax& s_;

 public:
  const int64_t block;
  Buffer<float> x, logits;
};

DLVAE_INLINE float softmax_of(float logit, float largest, float scale) {
  return exponential(fill(logit - largest))[0] * scale;
}

// Adds a chunk to the sum of exp(logit - m), where m is the largest logit so far.
inline void add_exponentials(const float* logits, int64_t n, float& largest, double& sum) {
  Floats most = fill(largest);
  for (int64_t i = 0; i < n; i += WIDTH) most = larger(most, load<Floats>(logits + i));
  float m = most[0];
  for (int i = 1; i < WIDTH; ++i) m = most[i] > m ? most[i] : m;
  // While all logits are minus infinity there is nothing to add. Logits that are NaN make the sum NaN.
  const Floats shift = fill(m == -__builtin_inff() ? 0 : m);
  Floats part{};
  for (int64_t i = 0; i < n; i += WIDTH) part += exponential(load<Floats>(logits + i) - shift);
  double total = 0;
  for (int i = 0; i < WIDTH; ++i) total += part[i];
  if (m > largest) sum *= exponential(fill(largest - m))[0];
  largest = m;
  sum += total;
}

inline void kept_softmax_rows(const KeptSoftmax& s, int64_t begin, int64_t end) {
  LogitBlock block(s);
  Buffer<float> largest(block.block);
  Buffer<double> sums(block.block);
  for (int64_t first = begin; first < end; first += block.block) {
    const int64_t count = first + block.block < end ? block.block : end - first;
    block.load(first, count);
    for (int64_t r = 0; r < count; ++r) largest[r] = -__builtin_inff(), sums[r] = 0;
    for (int64_t c = 0; c < s.codes; c += LOGITS) {
      const int64_t n = c + LOGITS < s.codes ? LOGITS : s.codes - c;
      block.find(count, c, n);
      for (int64_t r = 0; r < count; ++r) {
        const float* logits = block.logits + r * LOGITS;
        add_exponentials(logits, n, largest[r], sums[r]);
        const int64_t* indices = s.indices + (first + r) * s.k;
        float* values = s.values + (first + r) * s.k;
        for (int64_t j = 0; j < s.k; ++j)
          if ((uint64_t)(indices[j] - c) < (uint64_t)n) values[j] = logits[indices[j] - c];
      }
    }
    for (int64_t r = 0; r < count; ++r) {
      // If no logit is above minus infinity, the softmax is NaN.
      const float sum = sums[r] == 0 ? __builtin_nanf("") : (float)sums[r];
      const float m = largest[r], scale = 1 / sum;
      float* values = s.values + (first + r) * s.k;
      int64_t j = 0;
      for (; j + WIDTH <= s.k; j += WIDTH) store(values + j, exponential(load<Floats>(values + j) - m) * scale);
      for (; j < s.k; ++j) values[j] = softmax_of(values[j], m, scale);
      s.sums[2 * (first + r)] = m;
      s.sums[2 * (first + r) + 1] = sum;
    }
  }
}

// Computes the gradient of the logits of rows [begin, end) of the superblock that begins at row `origin`, and the
// gradient of x. load(block, first, count) loads a block of rows; gradient(row, row in block, first code, number of
// codes, logits) replaces logits of a row by their gradients.
template <class Load, class Gradient>
inline void softmax_grad_rows(
    const KeptSoftmaxBackward& b, int64_t origin, int64_t begin, int64_t end, const Load& load_block,
    const Gradient& gradient) {
  const KeptSoftmax& s = b.forward;
  LogitBlock block(s);
  const int64_t panels = panels_of(s.features), ld = panels * PANEL;
  const bool needs_x = b.grad_x.data != nullptr;
  Buffer<float> grad_x(needs_x ? block.block * ld : 0);
  for (int64_t first = begin; first < end; first += block.block) {
    const int64_t count = first + block.block < end ? block.block : end - first;
    load_block(block, first, count);
    if (b.needs_weight) {
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t n = s.features - p * PANEL < PANEL ? s.features - p * PANEL : PANEL;
        pack_columns(block.x + p * PANEL, s.features, count, n, b.rows + (p * b.room + first - origin) * PANEL);
      }
    }
    for (int64_t c = 0; c < s.codes; c += LOGITS) {
      const int64_t n = c + LOGITS < s.codes ? LOGITS : s.codes - c;
      block.find(count, c, n);
      for (int64_t r = 0; r < count; ++r) {
        const int64_t row = first + r;
        float* logits = block.logits + r * LOGITS;
        gradient(row, r, c, n, logits);
        if (!b.needs_weight && !b.needs_bias) continue;
        // The codes of the last tile beyond K may hold anything: nothing else depends on them.
        float* to = b.logits + (c * b.room + (row - origin) * ROWS);
        for (int64_t i = 0; i < n; i += ROWS) memcpy(to + i * b.room, logits + i, ROWS * sizeof(float));
      }
      if (needs_x)
        multiply(
            (const float*)block.logits, RowMajor{LOGITS}, count, b.columns + c * PANEL, s.codes * PANEL, panels, n,
            grad_x, ld, nullptr, c > 0);
    }
    if (needs_x) store_rows(b.grad_x, first, first + count, grad_x, ld);
  }
}

inline void kept_softmax_grad_rows(const KeptSoftmaxBackward& b, int64_t origin, int64_t begin, int64_t end) {
  const KeptSoftmax& s = b.forward;
  Buffer<float> slopes(softmax_block(s.features));
  softmax_grad_rows(
      b, origin, begin, end,
      [&](LogitBlock& block, int64_t first, int64_t count) {
        block.load(first, count);
        for (int64_t r = 0; r < count; ++r) {
          const int64_t at = (first + r) * s.k;
          double slope = 0;
          for (int64_t j = 0; j < s.k; ++j) slope += b.grad[at + j] * s.values[at + j];
          slopes[r] = (float)slope;
        }
      },
      [&](int64_t row, int64_t r, int64_t c, int64_t n, float* logits) {
        const float m = s.sums[2 * row], scale = 1 / s.sums[2 * row + 1], slope = slopes[r];
        for (int64_t i = 0; i < n; i += WIDTH)
          store(logits + i, exponential(load<Floats>(logits + i) - m) * scale * -slope);
        for (int64_t j = row * s.k; j < (row + 1) * s.k; ++j)
          if ((uint64_t)(s.indices[j] - c) < (uint64_t)n) logits[s.indices[j] - c] += b.grad[j] * s.values[j];
      });
}

// Adds the superblock of `count` rows to the gradients of tiles [begin, end) of codes.
inline void kept_softmax_grad_codes(const KeptSoftmaxBackward& b, int64_t count, int64_t begin, int64_t end) {
  const int64_t codes = whole_tiles(b.forward.codes), panels = panels_of(b.forward.features);
  // This many tiles of a slice of rows stay in the second-level cache while all panels use them.
  constexpr int64_t TILES = 256 / ROWS;
  for (int64_t tile = begin; b.needs_weight && tile < end; tile += TILES) {
    const int64_t tiles = tile + TILES < end ? TILES : end - tile;
    for (int64_t r = 0; r < count; r += SLICE) {
      const int64_t rows = r + SLICE < count ? SLICE : count - r;
      for (int64_t p = 0; p < panels; ++p)
        multiply(
            (const float*)b.logits + (tile * b.room + r) * ROWS, Tiled{b.room}, tiles * ROWS,
            b.rows + (p * b.room + r) * PANEL, 0, 1, rows, b.weight + (p * codes + tile * ROWS) * PANEL, PANEL, nullptr,
            true);
    }
  }
  if (!b.needs_bias) return;
  for (int64_t tile = begin; tile < end; ++tile) {
    const float* rows = b.logits + tile * ROWS * b.room;
    for (int64_t r0 = 0; r0 < count; r0 += CHAIN) {
      const int64_t r1 = r0 + CHAIN < count ? r0 + CHAIN : count;
      float sums[ROWS] = {};
      for (int64_t r = r0; r < r1; ++r)
        for (int i = 0; i < ROWS; ++i) sums[i] += rows[r * ROWS + i];
      for (int i = 0; i < ROWS; ++i) b.bias[tile * ROWS + i] += sums[i];
    }
  }
}

// Copies rows [begin, end) of the gradient of the weight out of its panels.
inline void unpack_weight(const KeptSoftmaxBackward& b, int64_t begin, int64_t end, float* weight) {
  const int64_t features = b.forward.features, codes = whole_tiles(b.forward.codes);
  for (int64_t p = 0; p < panels_of(features); ++p) {
    const int64_t n = features - p * PANEL < PANEL ? features - p * PANEL : PANEL;
    for (int64_t c = begin; c < end; ++c)
      memcpy(weight + c * features + p * PANEL, b.weight + (p * codes + c) * PANEL, n * sizeof(float));
  }
}

inline void pack_weight(
    const float* weight, int64_t codes, int64_t features, int64_t begin, int64_t end, float* panels) {
  pack_transposed(weight, nullptr, codes, features, 1, begin, end, panels);
}

// Packs panels [begin, end) of the weight without transposing it: its features are side by side.
inline void pack_weight_columns(
    const float* weight, int64_t codes, int64_t features, int64_t begin, int64_t end, float* panels) {
  for (int64_t p = begin; p < end; ++p) {
    const int64_t n = features - p * PANEL < PANEL ? features - p * PANEL : PANEL;
    pack_columns(weight + p * PANEL, features, codes, n, panels + p * codes * PANEL);
  }
}

}  // namespace
