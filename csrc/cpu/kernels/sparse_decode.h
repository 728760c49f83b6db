// Rows as sums of k atoms, and inner products of rows with their atoms.
#pragma once

#include "../segments.h"
#include "buffer.h"
#include "rows.h"
#include "weighted_sum.h"

namespace {

using dlvae::Atoms;

// Rows that pass through scratch memory together.
constexpr int64_t BATCH = 16;

inline void decode_rows(const Atoms& atoms, const float* values, int64_t begin, int64_t end, const Rows& out) {
  const int64_t features = atoms.features, k = atoms.k;
  const bool in_place = is_dense(out);
  const int64_t ld = in_place ? out.strides[0] : features;
  Buffer<float> copy(in_place ? 0 : BATCH * features);
  for (int64_t first = begin; first < end; first += BATCH) {
    const int64_t last = first + BATCH < end ? first + BATCH : end;
    float* to = in_place ? (float*)out.data + first * ld : copy;
    for (int64_t row = first; row < last; ++row) {
      const Terms<int64_t> terms{
          atoms.indices + row * k, atoms.indices + atoms.rows * k, values + row * k, 0, k,
          atoms.dictionary, 0, features, atoms.is_far};
      add_terms(terms, 0, features, true, to + (row - first) * ld);
    }
    if (!in_place) store_rows(out, first, last, to, ld);
  }
}

// Of vectors with groups of SIZE elements: groups of half the size, in which those of x, then of y, are halfway summed.
template <int SIZE>
DLVAE_INLINE Floats halve(Floats x, Floats y) {
  Ints low;
  for (int i = 0; i < WIDTH; ++i) low[i] = i / (SIZE / 2) * SIZE + i % (SIZE / 2);
  return shuffle(x, y, low) + shuffle(x, y, low + SIZE / 2);
}

// Inner products of a row with A atoms: each as WIDTH / A elements that are still to be summed.
template <int A>
DLVAE_INLINE Floats products(const float* row, const float* const* atoms, int64_t features) {
  Floats sums[A];
  const float* at[A];
  unroll<A>([&](auto a) {
    constexpr int i = decltype(a)::value;
    sums[i] = Floats{};
    at[i] = atoms[i];
  });
  int64_t d = 0;
  for (; d + WIDTH <= features; d += WIDTH) {
    const Floats value = load<Floats>(row + d);
    unroll<A>([&](auto a) {
      constexpr int i = decltype(a)::value;
      sums[i] += value * load<Floats>(at[i] + d);
    });
  }
  if (d < features) {
    const Floats value = load_part(row + d, features - d);
    unroll<A>([&](auto a) {
      constexpr int i = decltype(a)::value;
      sums[i] += value * load_part(at[i] + d, features - d);
    });
  }
  unroll<A / 2>([&](auto a) {
    constexpr int i = decltype(a)::value;
    sums[i] = halve<WIDTH>(sums[2 * i], sums[2 * i + 1]);
  });
  unroll<A / 4>([&](auto a) {
    constexpr int i = decltype(a)::value;
    sums[i] = halve<WIDTH / 2>(sums[2 * i], sums[2 * i + 1]);
  });
  if constexpr (A == 8) sums[0] = halve<WIDTH / 4>(sums[0], sums[1]);
  return sums[0];
}

// Inner products of a row with WIDTH atoms.
DLVAE_INLINE Floats products_of(const float* row, const float* const* atoms, int64_t features) {
  if constexpr (WIDTH == 16) {
    return halve<2>(products<8>(row, atoms, features), products<8>(row, atoms + 8, features));
  } else {
    return products<WIDTH>(row, atoms, features);
  }
}

inline void atom_products(const Atoms& atoms, const Rows& rows, int64_t begin, int64_t end, float* values) {
  const int64_t features = atoms.features, k = atoms.k;
  const bool in_place = is_dense(rows);
  const int64_t ld = in_place ? rows.strides[0] : features;
  Buffer<float> copy(in_place ? 0 : BATCH * features);
  const int64_t* indices_end = atoms.indices + atoms.rows * k;
  for (int64_t first = begin; first < end; first += BATCH) {
    const int64_t last = first + BATCH < end ? first + BATCH : end;
    if (!in_place) load_rows(rows, first, last, copy, features);
    const float* from = in_place ? (const float*)rows.data + first * ld : copy;
    for (int64_t row = first; row < last; ++row) {
      for (int64_t j = 0; j < k; j += WIDTH) {
        const int64_t count = k - j < WIDTH ? k - j : WIDTH;
        const int64_t* indices = atoms.indices + row * k + j;
        const float* at[WIDTH];
        for (int i = 0; i < WIDTH; ++i)
          at[i] = atoms.dictionary + indices[i < count ? i : count - 1] * features;
        if (atoms.is_far) {
          // Where the next atoms begin; the processor goes on by itself.
          for (const int64_t* next = indices + count; next < indices + count + WIDTH && next < indices_end; ++next)
            for (int64_t d = 0; d < features && d < 64; d += 16)
              __builtin_prefetch(atoms.dictionary + *next * features + d);
        }
        const Floats found = products_of(from + (row - first) * ld, at, features);
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
