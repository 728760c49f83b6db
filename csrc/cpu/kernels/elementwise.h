// Elementwise passes over rows.
#pragma once

#include "dense_rows.h"
#include "weighted_sum.h"

namespace {

// The number of rows that pass through scratch memory together: whole tiles of rows that are transposed.
inline int64_t batch_of(int64_t features) { return features < 256 ? 64 : 16; }

// Copies the codes that `indices` select to rows [begin, end) of `to`; the index -1 gives zeros.
inline void copy_rows(const dlvae::CodeRows& codes, const int64_t* indices, int64_t begin, int64_t end, char* to) {
  constexpr int64_t STEP = sizeof(Floats), AHEAD = 8;
  const int64_t row_bytes = codes.bytes;
  if (row_bytes == 0) return;
  const auto code_of = [&](int64_t i) {
    return codes.data + (codes.heads == 1 ? 0 : i % codes.heads * codes.head_stride) + indices[i] * codes.stride;
  };
  for (int64_t i = begin; i < end; ++i) {
    char* out = to + i * row_bytes;
    if (indices[i] < 0) {
      memset(out, 0, row_bytes);
      continue;
    }
    const char* row = code_of(i);
    if (i + AHEAD < end) {
      const char* later = code_of(i + AHEAD);
      for (int64_t b = 0; b < row_bytes && b < 1024; b += 64) __builtin_prefetch(later + b);
    }
    int64_t b = 0;
    for (; b + 4 * STEP <= row_bytes; b += 4 * STEP)
      unroll<4>([&](auto v) {
        constexpr int64_t at = decltype(v)::value * STEP;
        store(out + b + at, load<Floats>(row + b + at));
      });
    for (; b + STEP <= row_bytes; b += STEP) store(out + b, load<Floats>(row + b));
    if (b < row_bytes) memcpy(out + b, row + b, row_bytes - b);
  }
}

inline void ema_rows(
    const Rows& codebook, const Rows& embed_sum, const Rows& statistics, const float* sizes, float weight,
    int64_t begin, int64_t end) {
  const int64_t features = codebook.features, batch = batch_of(features);
  DenseRows codes(codebook, batch), sums(embed_sum, batch), batch_sums(statistics, batch);
  for (int64_t first = begin; first < end; first += batch) {
    const int64_t last = first + batch < end ? first + batch : end;
    float* code = codes.load(first, last);
    float* sum = sums.load(first, last);
    const float* add = batch_sums.load(first, last);
    for (int64_t row = first; row < last; ++row, code += codes.ld(), sum += sums.ld(), add += batch_sums.ld()) {
      // The same formula as torch.lerp, which is exact at both ends.
      if (weight < 0.5f) {
        for (int64_t d = 0; d < features; ++d) sum[d] = sum[d] + weight * (add[d] - sum[d]);
      } else {
        for (int64_t d = 0; d < features; ++d) sum[d] = add[d] - (1 - weight) * (add[d] - sum[d]);
      }
      if (sizes[row] > 0)
        for (int64_t d = 0; d < features; ++d) code[d] = sum[d] / sizes[row];
    }
    codes.store(first, last);
    sums.store(first, last);
  }
}

inline void subtract_scaled(const Rows& a, const Rows& b, float scale, const Rows& out, int64_t begin, int64_t end) {
  const int64_t features = out.features, batch = batch_of(features);
  DenseRows from(a, batch), less(b, batch), to(out, batch);
  for (int64_t first = begin; first < end; first += batch) {
    const int64_t last = first + batch < end ? first + batch : end;
    const float* x = from.load(first, last);
    const float* y = less.load(first, last);
    float* z = to.at(first);
    for (int64_t row = first; row < last; ++row, x += from.ld(), y += less.ld(), z += to.ld())
      for (int64_t d = 0; d < features; ++d) z[d] = x[d] - scale * y[d];
    to.store(first, last);
  }
}

}  // namespace
