// Lengths of codes and rows before packing.
#pragma once

#include "arithmetic.h"
#include "distances.h"

namespace {

// A row is searched by differences if one of its features is larger than this, in the scale of the codes.
constexpr float LARGEST_FEATURE = 0x1p40f;

typedef uint32_t Words __attribute__((vector_size(WIDTH * 4)));

// Computes the peaks, norms and hashes of codes [begin, end) before scaling.
inline void measure_codes(const Codebook& book, int64_t begin, int64_t end) {
  // The hash is the sum of all features, each mixed and multiplied by an odd factor of its own. Adding zero turns -0
  // into 0.
  constexpr uint32_t FACTOR = 0x9e3779b1, STEP = 0x7feb352c;
  for (int64_t k = begin; k < end; ++k) {
    const float* code = book.centred + k * book.features;
    Floats highs = {};
    Words factors = (Words)(2 * counting() + 1) * FACTOR, sums = {};
    for (int64_t d = 0; d < book.features; d += WIDTH) {
      const int64_t rest = book.features - d;
      const Floats value = rest < WIDTH ? load_first(code + d, rest) : load<Floats>(code + d);
      highs = larger(highs, larger(value, -value));
      const Words bits = (Words)(value + 0.0f);
      sums += (bits ^ bits >> 16) * factors;
      factors += STEP;
    }
    uint32_t hash = 0;
    for (int i = 0; i < WIDTH; ++i) hash += sums[i];
    book.hashes[k] = hash;
    // The square is not finite if any feature is NaN or infinite.
    const double square = squared_norm(code, book.features);
    const bool is_whole = square - square == 0;
    book.peaks[k] = is_whole ? -lowest(-highs) : (float)square;
    book.norms[k] = is_whole ? __builtin_sqrt(square) : 0;
  }
}

// Computes the same properties of rows x [count, D], in the scale of the codes.
inline void measure_rows(const Codebook& book, const float* x, int64_t count, Measure& measure) {
  const int64_t features = book.features;
  Floats peaks = {};
  for (int64_t r = 0; r < count; ++r, x += features) {
    Floats sums = {}, highs = {};
    float sum = 0, high = 0;
    int64_t d = 0;
    for (; d + WIDTH <= features; d += WIDTH) {
      const Floats value = load<Floats>(x + d) * book.scale;
      sums += value * value;
      highs = larger(highs, larger(value, -value));
    }
    for (; d < features; ++d) {
      const float value = __builtin_fabsf(x[d] * book.scale);
      sum += value * value;
      high = value > high ? value : high;
    }
    sum += total(sums);
    // The sum alone shows whether a feature is NaN or infinite.
    measure.is_slow[r] = !(sum < LARGEST_FEATURE * LARGEST_FEATURE);
    measure.norms[r] = measure.is_slow[r] ? 0 : __builtin_sqrtf(sum) * 1.0005f + 0x1p-60f;
    if (measure.is_slow[r]) continue;
    peaks = larger(peaks, larger(highs, fill(high)));
    measure.norm = measure.norms[r] > measure.norm ? measure.norms[r] : measure.norm;
  }
  measure.peak = -lowest(-peaks);
}

}  // namespace
