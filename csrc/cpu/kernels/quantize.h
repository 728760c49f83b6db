// Nearest codes of rows, half the errors and the sum of squared errors, in the same pass as the search.
#pragma once

#include "search_kernel.h"

namespace {

// Writes (c - x) / 2 to `to` unless that is null: half of a difference of float16 numbers does not overflow float16.
// Returns |c - x|^2.
inline double subtract(const float* c, const float* x, int64_t features, float* to) {
  Floats sums = {};
  float rest = 0;
  int64_t d = 0;
  for (; d + WIDTH <= features; d += WIDTH) {
    const Floats error = load<Floats>(c + d) - load<Floats>(x + d);
    sums += error * error;
    if (to) store(to + d, error * 0.5f);
  }
  for (; d < features; ++d) {
    const float error = c[d] - x[d];
    rest += error * error;
    if (to) to[d] = error * 0.5f;
  }
  const float sum = total(sums) + rest;
  // The sum of squares may overflow float32 although the mean over all rows does not.
  return is_finite(sum) ? sum : squared_distance(x, c, features);
}

inline void quantize_rows(
    const Codebook& book, const Rows& x, int64_t begin, int64_t end, int64_t* indices, const Rows& quantized,
    const Rows& half_error, double* losses) {
  const int64_t features = book.features;
  DenseRows codes(quantized, BLOCK), errors(half_error, BLOCK);
  for_searched_blocks(book, x, begin, end, indices, nullptr, [&](int64_t first, int64_t count, const float* row) {
    float* to = codes.at(first);
    float* error = half_error.data ? errors.at(first) : nullptr;
    double loss = 0;
    for (int64_t r = 0; r < count; ++r, row += features, to += codes.ld()) {
      const float* code = book.codes + indices[first + r] * features;
      memcpy(to, code, features * sizeof(float));
      loss += subtract(code, row, features, error);
      if (error) error += errors.ld();
    }
    losses[first / BLOCK] = loss;
    codes.store(first, first + count);
    if (error) errors.store(first, first + count);
  });
}

}  // namespace
