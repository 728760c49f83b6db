// Rows as sums of k atoms, and inner products of rows with their atoms.
#pragma once

#include "../segments.h"
#include "dense_rows.h"
#include "weighted_sum.h"

namespace {

using dlvae::Atoms;

// The number of rows that pass through scratch memory together.
constexpr int64_t BATCH = 16;

inline void decode_rows(const Atoms& atoms, const float* values, int64_t begin, int64_t end, const Rows& out) {
  const int64_t features = atoms.features, k = atoms.k;
  DenseRows sums(out, BATCH);
  Buffer<double> totals(k > SUM_CHAIN ? features : 0);
  for (int64_t first = begin; first < end; first += BATCH) {
    const int64_t last = first + BATCH < end ? first + BATCH : end;
    float* sum = sums.at(first);
    for (int64_t row = first; row < last; ++row, sum += sums.ld()) {
      const auto terms = [&] {
        return Terms<int64_t>{
            atoms.indices + row * k,
            atoms.indices + atoms.rows * k,
            values + row * k,
            0,
            k,
            atoms.dictionary,
            0,
            INT64_MAX,
            features,
            atoms.is_far};
      };
      if (k <= SUM_CHAIN) {
        add_chain(terms(), 0, features, true, sum);
      } else {
        add_chains(terms(), 0, k, 0, features, totals, sum);
      }
    }
    sums.store(first, last);
  }
}

// x and y hold groups of SIZE elements. Returns groups of half the size, first those of x, then those of y; each
// element is the sum of two elements of the old group.
template <int SIZE>
DLVAE_INLINE Floats halve(Floats x, Floats y) {
  Ints low;
  for (int i = 0; i < WIDTH; ++i) low[i] = i / (SIZE / 2) * SIZE + i % (SIZE / 2);
  return shuffle(x, y, low) + shuffle(x, y, low + SIZE / 2);
}

// Returns the sum of the elements of each of COUNT vectors, starting at v.
template <int COUNT>
DLVAE_INLINE Floats totals(const Floats* v) {
  if constexpr (COUNT == 1) {
    return *v;
  } else {
    // Each of the COUNT vectors has WIDTH / COUNT elements left in the result.
    return halve<2 * WIDTH / COUNT>(totals<COUNT / 2>(v), totals<COUNT / 2>(v + COUNT / 2));
  }
}

// The number of atoms that are prefetched.
constexpr int AHEAD = 4;

// Multiplies V vectors of a row, or its last `part` floats if V is 0, by the same features of `count` atoms, and adds
// the products to `sums`, one vector per atom.
template <int V>
DLVAE_INLINE void add_products(
    const float* row, const float* const* atoms, int64_t count, int64_t feature, int64_t part, bool is_far,
    Floats* sums) {
  constexpr int COUNT = V == 0 ? 1 : V;
  Floats values[COUNT];
  unroll<COUNT>([&](auto v) {
    constexpr int i = decltype(v)::value;
    values[i] = V == 0 ? load_part(row + feature, part) : load<Floats>(row + feature + i * WIDTH);
  });
  for (int64_t a = 0; a < count; ++a) {
    const float* atom = atoms[a] + feature;
    if (is_far) {
      const float* later = atoms[a + AHEAD] + feature;
      unroll<(COUNT * WIDTH + 15) / 16>([&](auto v) { __builtin_prefetch(later + decltype(v)::value * 16); });
    }
    Floats sum = feature == 0 ? Floats{} : sums[a];
    unroll<COUNT>([&](auto v) {
      constexpr int i = decltype(v)::value;
      sum += values[i] * (V == 0 ? load_part(atom, part) : load<Floats>(atom + i * WIDTH));
    });
    sums[a] = sum;
  }
}

// Returns the inner products of a row with `count` atoms, at most WIDTH. `atoms` is followed by AHEAD atoms to
// prefetch.
DLVAE_INLINE Floats
products(const float* row, const float* const* atoms, int64_t count, int64_t features, bool is_far) {
  Floats sums[WIDTH];
  for (int64_t a = count; a < WIDTH; ++a) sums[a] = Floats{};
  int64_t d = 0;
  const auto one = [&](auto v) {
    constexpr int V = decltype(v)::value;
    if (d + V * WIDTH > features) return;
    add_products<V>(row, atoms, count, d, 0, is_far, sums);
    d += V * WIDTH;
  };
  while (d + 2 * ROWS * WIDTH <= features) one(Constant<2 * ROWS>{});
  if constexpr (ROWS == 8) one(Constant<8>{});
  one(Constant<4>{});
  one(Constant<2>{});
  one(Constant<1>{});
  if (d < features) add_products<0>(row, atoms, count, d, features - d, is_far, sums);
  return totals<WIDTH>(sums);
}

inline void atom_products(const Atoms& atoms, const Rows& rows, int64_t begin, int64_t end, float* values) {
  const int64_t features = atoms.features, k = atoms.k;
  DenseRows dense(rows, BATCH);
  const int64_t* indices_end = atoms.indices + atoms.rows * k;
  for (int64_t first = begin; first < end; first += BATCH) {
    const int64_t last = first + BATCH < end ? first + BATCH : end;
    const float* x = dense.load(first, last);
    for (int64_t row = first; row < last; ++row, x += dense.ld()) {
      for (int64_t j = 0; j < k; j += WIDTH) {
        const int64_t count = k - j < WIDTH ? k - j : WIDTH;
        const int64_t* indices = atoms.indices + row * k + j;
        const float* at[WIDTH + AHEAD];
        for (int64_t i = 0; i < count + AHEAD; ++i) {
          const int64_t* index = indices + i < indices_end ? indices + i : indices;
          at[i] = atoms.dictionary + *index * features;
        }
        const Floats found = products(x, at, count, features, atoms.is_far);
        if (count == WIDTH) {
          store(values + row * k + j, found);
        } else {
          store_part(values + row * k + j, count, found);
        }
      }
    }
  }
}

}  // namespace
