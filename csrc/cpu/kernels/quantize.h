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
    const Codebook& book, const Rows& x, int64_t begin, int64_t end, int64_t step, int64_t* indices, const bool* mask,
    const Rows& quantized, const Rows& half_error, double* losses) {
  const int64_t features = book.features;
  DenseRows codes(quantized, BLOCK), errors(half_error, BLOCK);
  const auto write = [&](int64_t first, int64_t count, const float* row, const int64_t* found) {
    float* to = codes.at(first);
    float* error = half_error.data ? errors.at(first) : nullptr;
    double loss = 0;
    for (int64_t r = 0; r < count; ++r, row += features, to += codes.ld()) {
      const int64_t at = (first + r) * step;
      const bool has_code = !mask || mask[at];
      indices[at] = has_code ? found[r] : -1;
      if (has_code) {
        const float* code = book.codes + found[r] * features;
        memcpy(to, code, features * sizeof(float));
        loss += subtract(code, row, features, error);
      } else {
        memset(to, 0, features * sizeof(float));
        if (error) memset(error, 0, features * sizeof(float));
      }
      if (error) error += errors.ld();
    }
    losses[first / BLOCK] = loss;
    codes.store(first, first + count);
    if (error) errors.store(first, first + count);
  };
  for_searched_blocks(book, x, begin, end, write);
}

}  // namespace
