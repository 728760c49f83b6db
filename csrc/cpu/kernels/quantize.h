// Rows replaced by their nearest codes, with the errors and the sum of their squares, in the pass that searches.
#pragma once

#include "search.h"

namespace {

// to = c - x; returns the sum of squares.
inline float subtract(const float* c, const float* x, int64_t features, float* to) {
  Floats sums = {};
  float rest = 0;
  int64_t d = 0;
  for (; d + WIDTH <= features; d += WIDTH) {
    const Floats error = load<Floats>(c + d) - load<Floats>(x + d);
    sums += error * error;
    if (to) store(to + d, error);
  }
  for (; d < features; ++d) {
    const float error = c[d] - x[d];
    rest += error * error;
    if (to) to[d] = error;
  }
  return total(sums) + rest;
}

inline void quantize_rows(
    const Codebook& book, const Rows& x, int64_t begin, int64_t end, int64_t* indices, const Rows& quantized,
    const Rows& error, double* losses) {
  const int64_t features = book.features;
  // Where a result is adjacent float32 it is written in place, else by way of a block.
  const bool in_place = adjacent_rows(quantized, 0), error_in_place = error.data && adjacent_rows(error, 0);
  Buffer<float> codes(in_place ? 0 : BLOCK * features), errors(error.data && !error_in_place ? BLOCK * features : 0);
  for_searched_blocks(book, x, begin, end, indices, nullptr, [&](int64_t first, int64_t count, const float* block) {
    float* code_rows = in_place ? (float*)adjacent_rows(quantized, first) : codes;
    float* error_rows = error_in_place ? (float*)adjacent_rows(error, first) : error.data ? (float*)errors : nullptr;
    double loss = 0;
    for (int64_t r = 0; r < count; ++r) {
      const float* code = book.codes + indices[first + r] * features;
      memcpy(code_rows + r * features, code, features * sizeof(float));
      loss += subtract(code, block + r * features, features, error_rows ? error_rows + r * features : nullptr);
    }
    losses[first / BLOCK] = loss;
    if (!in_place) store_rows(quantized, first, first + count, codes, features);
    if (error_rows && !error_in_place) store_rows(error, first, first + count, errors, features);
  });
}

}  // namespace
