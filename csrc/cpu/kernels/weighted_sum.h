// Weighted sums of rows that are selected by index.
#pragma once

#include "../segments.h"
#include "simd.h"

namespace {

using dlvae::SUM_CHAIN;

// Loads the first count < WIDTH floats of a vector, followed by zeros.
DLVAE_INLINE Floats load_part(const float* from, int64_t count) {
#if defined(DLVAE_AVX512)
  return _mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), from);
#else
  Floats v{};
  for (int64_t i = 0; i < count; ++i) v[i] = from[i];
  return v;
#endif
}
DLVAE_INLINE void store_part(float* to, int64_t count, Floats v) {
#if defined(DLVAE_AVX512)
  _mm512_mask_storeu_ps(to, (__mmask16)((1u << count) - 1), v);
#else
  for (int64_t i = 0; i < count; ++i) to[i] = v[i];
#endif
}

// The terms weights[i] * (row which[i]) for i in [0, count).
template <class Index>
struct Terms {
  const Index* which;
  const Index* which_end;  // end of the known indices, up to which rows are prefetched
  const float* weights;    // null if each is `weight`
  float weight;
  int64_t count;
  const float* rows;
  int64_t first, end;  // the indices of the rows at `rows`; later indices may lie outside
  int64_t ld;
  bool is_far;
};

// Adds the terms in order to V vectors at `to`, or to its last `part` floats if V is 0.
template <int V, class Index>
DLVAE_INLINE void add_terms_to(const Terms<Index>& terms, int64_t feature, int64_t part, bool is_first, float* to) {
  constexpr int COUNT = V == 0 ? 1 : V;
  constexpr int LATER = 12;
  Floats sums[COUNT];
  unroll<COUNT>([&](auto v) {
    constexpr int i = decltype(v)::value;
    if (is_first) {
      sums[i] = Floats{};
    } else {
      sums[i] = V == 0 ? load_part(to, part) : load<Floats>(to + i * WIDTH);
    }
  });
  const float* base = terms.rows + feature;
  for (int64_t t = 0; t < terms.count; ++t) {
    const float* row = base + ((int64_t)terms.which[t] - terms.first) * terms.ld;
    if (terms.is_far && terms.which + t + LATER < terms.which_end) {
      const int64_t number = (int64_t)terms.which[t + LATER];
      const float* later = number >= terms.first && number < terms.end ? base + (number - terms.first) * terms.ld : row;
      unroll<(COUNT * WIDTH + 15) / 16>([&](auto v) { __builtin_prefetch(later + decltype(v)::value * 16); });
    }
    const Floats weight = fill(terms.weights == nullptr ? terms.weight : terms.weights[t]);
    unroll<COUNT>([&](auto v) {
      constexpr int i = decltype(v)::value;
      sums[i] += weight * (V == 0 ? load_part(row, part) : load<Floats>(row + i * WIDTH));
    });
  }
  unroll<COUNT>([&](auto v) {
    constexpr int i = decltype(v)::value;
    if (V == 0) {
      store_part(to, part, sums[i]);
    } else {
      store(to + i * WIDTH, sums[i]);
    }
  });
}

// Adds the terms to features [begin, end) of the sum at `to`, or overwrites these if `is_first`.
template <class Index>
DLVAE_INLINE void add_chain(const Terms<Index>& terms, int64_t begin, int64_t end, bool is_first, float* to) {
  int64_t d = begin;
  for (; d + 2 * ROWS * WIDTH <= end; d += 2 * ROWS * WIDTH) add_terms_to<2 * ROWS>(terms, d, 0, is_first, to + d);
  const auto one = [&](auto v) {
    constexpr int V = decltype(v)::value;
    if (d + V * WIDTH > end) return;
    add_terms_to<V>(terms, d, 0, is_first, to + d);
    d += V * WIDTH;
  };
  if constexpr (ROWS == 8) one(Constant<8>{});
  one(Constant<4>{});
  one(Constant<2>{});
  one(Constant<1>{});
  if (d < end) add_terms_to<0>(terms, d, end - d, is_first, to + d);
}

// totals += chain, or totals = chain if `is_first`, for features [begin, end).
inline void add_to_totals(const float* chain, int64_t begin, int64_t end, bool is_first, double* totals) {
  int64_t d = begin;
  for (; d + WIDTH / 2 <= end; d += WIDTH / 2) {
    const Doubles sum = widen(chain + d);
    store(totals + d, is_first ? sum : load<Doubles>(totals + d) + sum);
  }
  for (; d < end; ++d) totals[d] = is_first ? chain[d] : totals[d] + chain[d];
}

// Adds `terms`, which follow the first `done` terms, to features [begin, end) of a sum of `all` terms at `to`, where
// `all` exceeds SUM_CHAIN. The sum is the sum of its chains, in `totals`; between two calls `to` holds an incomplete
// chain.
template <class Index>
__attribute__((noinline)) void add_chains(
    const Terms<Index>& all_terms, int64_t done, int64_t all, int64_t begin, int64_t end, double* totals, float* to) {
  Terms<Index> terms = all_terms;
  for (int64_t left = terms.count; left > 0; left -= terms.count) {
    const int64_t place = done % SUM_CHAIN;
    terms.count = left < SUM_CHAIN - place ? left : SUM_CHAIN - place;
    add_chain(terms, begin, end, place == 0, to);
    done += terms.count;
    if (done % SUM_CHAIN == 0 || done == all) add_to_totals(to, begin, end, done <= SUM_CHAIN, totals);
    terms.which += terms.count;
    if (terms.weights != nullptr) terms.weights += terms.count;
  }
  if (done == all)
    for (int64_t d = begin; d < end; ++d) to[d] = (float)totals[d];
}

}  // namespace
