// Entropies of the softmax over all codes, the means of the probabilities, and their gradients.
#pragma once

#include "../entropy.h"
#include "softmax_kernel.h"

namespace {

using dlvae::CodeEntropy;
using dlvae::CodeEntropyBackward;

// Returns logit - m, bounded from below where exp is 0: minus infinity times 0 would be NaN.
DLVAE_INLINE Floats shifted_logit(const float* logit, float m) { return larger(fill(-88.0f), load<Floats>(logit) - m); }

// Loads rows, with zeros for those that are not valid.
inline void load_valid(LogitBlock& block, const CodeEntropy& e, int64_t first, int64_t count) {
  block.load(first, count);
  const int64_t features = e.softmax.features;
  for (int64_t r = 0; e.valid != nullptr && r < count; ++r)
    if (!e.valid[first + r]) memset(block.x + r * features, 0, features * sizeof(float));
}

// Adds a chunk to the sums of exp(logit - m) and of exp(logit - m) (logit - m), where m is the largest logit so far.
inline void add_weighted(const float* logits, int64_t n, float& largest, double& sum, double& weighted) {
  Floats most = fill(largest);
  for (int64_t i = 0; i < n; i += WIDTH) most = larger(most, load<Floats>(logits + i));
  float m = most[0];
  for (int i = 1; i < WIDTH; ++i) m = most[i] > m ? most[i] : m;
  const float shift = m == -__builtin_inff() ? 0 : m;
  Floats part{}, weighted_part{};
  for (int64_t i = 0; i < n; i += WIDTH) {
    const Floats v = load<Floats>(logits + i) - shift, p = exponential(v);
    part += p;
    weighted_part += p * shifted_logit(logits + i, shift);
  }
  if (m > largest && sum > 0) {
    const double factor = exponential(fill(largest - m))[0];
    weighted = (weighted + sum * ((double)largest - m)) * factor;
    sum *= factor;
  }
  largest = m;
  sum += total(part);
  weighted += total(weighted_part);
}

// Writes the sums and entropies of rows [begin, end), and the sums of their probabilities to totals [panels of K,
// PANEL].
inline void code_entropy_rows(const CodeEntropy& e, int64_t begin, int64_t end, float* totals) {
  const KeptSoftmax& s = e.softmax;
  LogitBlock block(s);
  Buffer<float> largest(block.block);
  Buffer<double> sums(block.block), weighted(block.block);
  const int64_t columns = panels_of(s.codes) * PANEL;
  for (int64_t i = 0; i < columns; ++i) totals[i] = 0;
  for (int64_t first = begin; first < end; first += block.block) {
    const int64_t count = first + block.block < end ? block.block : end - first;
    load_valid(block, e, first, count);
    for (int64_t r = 0; r < count; ++r) largest[r] = -__builtin_inff(), sums[r] = weighted[r] = 0;
    for (int64_t c = 0; c < s.codes; c += LOGITS) {
      const int64_t n = c + LOGITS < s.codes ? LOGITS : s.codes - c;
      block.find(count, c, n);
      for (int64_t r = 0; r < count; ++r) add_weighted(block.logits + r * LOGITS, n, largest[r], sums[r], weighted[r]);
    }
    for (int64_t r = 0; r < count; ++r) {
      const bool is_valid = e.valid == nullptr || e.valid[first + r];
      // If no logit is above minus infinity, the softmax is NaN.
      const double sum = sums[r] == 0 ? __builtin_nan("") : sums[r];
      s.sums[2 * (first + r)] = is_valid ? largest[r] : 0;
      s.sums[2 * (first + r) + 1] = is_valid ? (float)sum : __builtin_inff();
      e.entropies[first + r] = is_valid ? (float)(__builtin_log(sum) - weighted[r] / sum) : 0;
    }
    for (int64_t c = 0; c < s.codes; c += LOGITS) {
      const int64_t n = c + LOGITS < s.codes ? LOGITS : s.codes - c;
      if (s.codes > LOGITS) block.find(count, c, n);
      for (int64_t r = 0; r < count; ++r) {
        const float m = s.sums[2 * (first + r)], scale = 1 / s.sums[2 * (first + r) + 1];
        if (scale == 0) continue;
        const float* logits = block.logits + r * LOGITS;
        for (int64_t i = 0; i < n; i += WIDTH)
          store(totals + c + i, load<Floats>(totals + c + i) + exponential(load<Floats>(logits + i) - m) * scale);
      }
    }
  }
}

// Processes rows [begin, end) of the superblock that begins at row `origin`.
inline void code_entropy_grad_rows(const CodeEntropyBackward& b, int64_t origin, int64_t begin, int64_t end) {
  const KeptSoftmax& s = b.softmax.forward;
  Buffer<float> expected(softmax_block(s.features));
  softmax_grad_rows(
      b.softmax, origin, begin, end,
      [&](LogitBlock& block, int64_t first, int64_t count) {
        load_valid(block, b.forward, first, count);
        // The mean of the slopes under the probabilities of each row.
        for (int64_t r = 0; r < count; ++r) expected[r] = 0;
        for (int64_t c = 0; c < s.codes; c += LOGITS) {
          const int64_t n = c + LOGITS < s.codes ? LOGITS : s.codes - c;
          block.find(count, c, n);
          for (int64_t r = 0; r < count; ++r) {
            const float* logits = block.logits + r * LOGITS;
            const float m = s.sums[2 * (first + r)], scale = 1 / s.sums[2 * (first + r) + 1];
            Floats sum{};
            for (int64_t i = 0; i < n; i += WIDTH)
              sum += exponential(load<Floats>(logits + i) - m) * load<Floats>(b.slopes + c + i);
            expected[r] += total(sum) * scale;
          }
        }
      },
      [&](int64_t row, int64_t r, int64_t c, int64_t n, float* logits) {
        const float m = s.sums[2 * row], sum = s.sums[2 * row + 1], grad = b.grad_entropies[row];
        if (sum == __builtin_inff()) {
          memset(logits, 0, panels_of(n) * PANEL * sizeof(float));
          return;
        }
        // p (slope - expected - grad (log p + entropy))
        const float offset = expected[r] + grad * (b.forward.entropies[row] - (float)__builtin_log(sum));
        for (int64_t i = 0; i < n; i += WIDTH) {
          const Floats p = exponential(load<Floats>(logits + i) - m) * (1 / sum);
          store(logits + i, p * (load<Floats>(b.slopes + c + i) - offset - shifted_logit(logits + i, m) * grad));
        }
      });
}

}  // namespace
