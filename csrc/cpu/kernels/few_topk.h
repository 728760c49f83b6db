// The k best codes of so few rows that packing the dictionary would take longer than the search; see few_rows.h.
//
// A lower bound of each score follows from its float32 sum and the error bound of that sum. Only codes whose lower
// bound is not above the worst of the k best so far are compared in float64.
#pragma once

#include "../topk.h"
#include "few_rows.h"
#include "order.h"

namespace {

using dlvae::Topk;

constexpr double ROUNDING = 0x1p-24;

// Returns the squared distance or the negated product in float64, lower is better. Equal codes get equal scores.
inline double exact_score(const Topk& t, const float* x, int64_t code) {
  const float* c = t.codes + code * t.features;
  if (!t.is_product) return squared_distance(x, c, t.features);
  const double product = product_of(x, c, t.features);
  return -(t.bias == nullptr ? product : product + (double)t.bias[code]);
}

// A row and the heap of its best codes so far, which is null for padding. A score that is not finite is stored as the
// largest number, or as infinity if the code or its bias holds NaN.
struct FewTopkRow {
  const float* x;
  Exact* heap;
  int64_t count;
  float limit;   // Lower bounds of codes that may be among the best are at most this
  int32_t last;  // the last code that was compared in float64, or -1
  double score;  // the score of `last`
};

struct AddProduct {
  DLVAE_INLINE Floats operator()(Floats sum, Floats x, Floats c) const { return sum + x * c; }
};

DLVAE_INLINE Floats square_root(Floats v) {
#if defined(DLVAE_AVX512)
  return (Floats)_mm512_sqrt_ps((__m512)v);
#else
  for (int i = 0; i < WIDTH; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

// Returns a vector whose element c is the length of code c < C. The length is rounded up, because squares below the
// smallest normal number are lost.
template <int C>
DLVAE_INLINE Floats lengths(const float* codes, int64_t features) {
  Floats sums[WIDTH] = {};
  for (int64_t d = 0; d < features; d += WIDTH) {
    const int64_t rest = features - d;
    unroll<C>([&](auto c) {
      const float* from = codes + decltype(c)::value * features + d;
      const Floats value = rest < WIDTH ? load_first(from, rest) : load<Floats>(from);
      sums[decltype(c)::value] += value * value;
    });
  }
  return square_root(totals(sums)) + 0x1p-60f;
}

// Not inlined, so that the sums stay in registers in the common case without a call.
__attribute__((noinline)) inline void compare_few_topk(
    const Topk& t, const float* bounds, int64_t first, int64_t count, FewTopkRow& row) {
  if (row.heap == nullptr) return;
  const int64_t bytes = t.features * (int64_t)sizeof(float);
  for (int64_t i = 0; i < count; ++i) {
    if (bounds[i] > row.limit) continue;
    const int32_t code = (int32_t)(first + i);
    const float* c = t.codes + code * t.features;
    const bool is_repeated = row.last >= 0 && memcmp(c, t.codes + row.last * t.features, bytes) == 0 &&
                             (t.bias == nullptr || t.bias[code] == t.bias[row.last]);
    if (!is_repeated) {
      row.score = exact_score(t, row.x, code);
      if (row.score - row.score != 0) {
        bool is_nan = t.bias != nullptr && t.bias[code] != t.bias[code];
        for (int64_t d = 0; d < t.features; ++d) is_nan |= c[d] != c[d];
        row.score = is_nan ? __builtin_inf() : __DBL_MAX__;
      }
      row.last = code;
    }
    row.count = add_to_heap(row.heap, row.count, t.k, {row.score, code});
    if (row.count < t.k) continue;
    const double worst = row.heap[0].score, above = worst + __builtin_fabs(worst) * 0x1p-22;
    row.limit = above < dlvae::NO_CODE ? (float)above + 0x1p-120f : __builtin_inff();
  }
}

template <int R>
DLVAE_INLINE void search_few_topk(
    const Topk& t, int64_t ld, int64_t code, int64_t n, const float* norms, FewTopkRow* rows) {
  constexpr int C = WIDTH / R;
  float each[WIDTH];
  if (n < C) {
    for (int64_t c = 0; c < n; ++c) each[c] = -__builtin_inff();
    for (int r = 0; r < R; ++r) compare_few_topk(t, each, code, n, rows[r]);
    return;
  }
  const float* codes = t.codes + code * t.features;
  // Roundings: one of a difference, which counts twice in its square, one of the square; those of the sums and of the
  // bound itself.
  const float error = (float)(1.02 * ROUNDING * (double)(t.features / WIDTH + 14));
  Floats bounds;
  if (t.is_product) {
    Floats lasting = shuffle(lengths<C>(codes, t.features), counting() & (C - 1)), scaled;
    for (int i = 0; i < WIDTH; ++i) scaled[i] = norms[i / C];
    bounds = -pair_sums<R>(rows->x, ld, codes, t.features, AddProduct{});
    Floats errors = lasting * scaled * error + (float)t.features * 0x1p-124f;
    if (t.bias != nullptr) {
      Floats bias;
      for (int i = 0; i < WIDTH; ++i) bias[i] = t.bias[code + i % C];
      bounds -= bias;
      errors += larger(bias, -bias) * 0x1p-22f;
    }
    bounds -= errors;
  } else {
    bounds = pair_sums<R>(rows->x, ld, codes, t.features, AddSquare{}) * (1 - error);
  }
  Floats limits;
  for (int i = 0; i < WIDTH; ++i) limits[i] = rows[i / C].limit;
  // A bound that is NaN does not exclude its code.
  if (!any((Ints)(bounds <= limits) | (Ints)(bounds != bounds))) return;
  store(each, bounds);
  for (int r = 0; r < R; ++r) compare_few_topk(t, each + r * C, code, C, rows[r]);
}

// Finds the k best of codes [begin, end) for each of the rows x [count, ld] and writes them to found [count, k] in any
// order; unused entries have the place -1. The rows are padded with zeros to whole vectors, and to a multiple of
// FEW_GROUP rows.
inline void topk_few(
    const Topk& t, const float* x, int64_t ld, int64_t count, int64_t begin, int64_t end, Exact* found) {
  const int64_t whole = count <= 2 ? count : (count + FEW_GROUP - 1) / FEW_GROUP * FEW_GROUP;
  FewTopkRow rows[dlvae::FEW_ROWS];
  float norms[dlvae::FEW_ROWS];
  for (int64_t r = 0; r < whole; ++r) {
    const bool is_row = r < count;
    rows[r] = {x + r * ld, is_row ? found + r * t.k : nullptr, 0, is_row ? __builtin_inff() : -__builtin_inff(), -1, 0};
    norms[r] = (float)(__builtin_sqrt(squared_norm(x + r * ld, t.features)) * 1.0001);
    for (int64_t i = 0; is_row && i < t.k; ++i) rows[r].heap[i].place = -1;
  }
  for_few_groups(count, begin, end, [&](auto group, int64_t r, int64_t k, int64_t n) {
    search_few_topk<decltype(group)::value>(t, ld, k, n, norms + r, rows + r);
  });
}

}  // namespace
