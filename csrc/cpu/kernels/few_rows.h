// The nearest codes of so few rows that packing the codebook would take longer than the search.
//
// Squared differences are summed in float32. The error is a small fraction of the sum itself, so a code whose sum is
// above a limit cannot be the nearest. Each of the few remaining codes is compared in float64.
#pragma once

#include "../codebook.h"
#include "distances.h"

namespace {

using dlvae::Codebook;
using dlvae::Found;

// Returns a vector whose element i is the sum of the elements of vector i.
DLVAE_INLINE Floats totals(Floats (&v)[WIDTH]) {
  const Ints even = 2 * counting(), odd = even + 1;
  unroll<4>([&](auto step) {
    constexpr int half = WIDTH >> (decltype(step)::value + 1);
    unroll<half>([&](auto i) {
      const Floats a = v[2 * decltype(i)::value], b = v[2 * decltype(i)::value + 1];
      v[decltype(i)::value] = shuffle(a, b, even) + shuffle(a, b, odd);
    });
  });
  return v[0];
}

// Returns a vector whose element r * C + c is the sum of term(sum, x, code) over the features of row r and code c.
template <int R, class F>
DLVAE_INLINE Floats pair_sums(const float* x, int64_t ld, const float* codes, int64_t features, const F& term) {
  constexpr int C = WIDTH / R;
  Floats sums[WIDTH] = {};
  if constexpr (R == 1) {
    // The codes are read one after another, as one stream that the processor prefetches.
    for (int c = 0; c < C; ++c) {
      const float* code = codes + c * features;
      int64_t d = 0;
      for (; d + WIDTH <= features; d += WIDTH) sums[c] = term(sums[c], load<Floats>(x + d), load<Floats>(code + d));
      if (d < features) sums[c] = term(sums[c], load<Floats>(x + d), load_first(code + d, features - d));
    }
  } else {
    const auto add = [&](int64_t d, auto is_whole) {
      Floats values[C];
      unroll<C>([&](auto c) {
        const float* from = codes + decltype(c)::value * features + d;
        values[decltype(c)::value] = decltype(is_whole)::value ? load<Floats>(from) : load_first(from, features - d);
      });
      unroll<R>([&](auto r) {
        constexpr int i = decltype(r)::value;
        const Floats row = load<Floats>(x + i * ld + d);
        unroll<C>([&](auto c) {
          constexpr int j = decltype(c)::value;
          sums[i * C + j] = term(sums[i * C + j], row, values[j]);
        });
      });
    };
    int64_t d = 0;
    for (; d + WIDTH <= features; d += WIDTH) add(d, Constant<1>{});
    if (d < features) add(d, Constant<0>{});
  }
  return totals(sums);
}

struct AddSquare {
  DLVAE_INLINE Floats operator()(Floats sum, Floats x, Floats c) const {
    const Floats difference = x - c;
    return sum + difference * difference;
  }
};

// A row, and the limit that follows from its nearest code so far.
struct FewRow {
  const float* x;
  Found nearest;
  float limit;  // Sums of codes that may be nearer are at most this. Below zero: the row is not searched
};

// Not inlined, so that the sums stay in registers in the common case without a call.
__attribute__((noinline)) inline void compare_few(
    const Codebook& book, const float* sums, int64_t first, int64_t count, FewRow& row) {
  // Roundings: one of a difference, which counts twice in its square, one of the square; those of the sums; one of the
  // limit.
  const double error = 1.01 * 0x1p-24 * (double)(book.features / WIDTH + 12);
  for (int64_t i = 0; i < count; ++i) {
    if (!(sums[i] <= row.limit)) continue;
    const float* code = book.codes + (first + i) * book.features;
    // The first of equal codes is the nearest. This skips the repeated comparison of many equal codes.
    const float* best = book.codes + row.nearest.index * book.features;
    if (row.nearest.index >= 0 && memcmp(code, best, book.features * sizeof(float)) == 0) continue;
    const double found = squared_distance(row.x, code, book.features);
    if (!row.nearest.loses_to(found, first + i)) continue;
    row.nearest = {found, first + i};
    row.limit = (float)(found * (1 + error)) + 0x1p-120f;
  }
}

template <int R>
DLVAE_INLINE void search_few_rows(const Codebook& book, int64_t ld, int64_t code, int64_t n, FewRow* rows) {
  constexpr int C = WIDTH / R;
  Floats sums;
  if (n == C) {
    sums = pair_sums<R>(rows->x, ld, book.codes + code * book.features, book.features, AddSquare{});
  } else {
    // Fewer than C codes are computed one at a time.
    float each[WIDTH];
    for (int64_t c = 0; c < n; ++c)
      for (int r = 0; r < R; ++r)
        each[r * C + c] = (float)squared_distance(rows[r].x, book.codes + (code + c) * book.features, book.features);
    for (int r = 0; r < R; ++r) compare_few(book, each + r * C, code, n, rows[r]);
    return;
  }
  Floats limits;
  for (int i = 0; i < WIDTH; ++i) limits[i] = rows[i / C].limit;
  if (!any((Ints)(sums <= limits))) return;
  float each[WIDTH];
  store(each, sums);
  for (int r = 0; r < R; ++r) compare_few(book, each + r * C, code, C, rows[r]);
}

// The number of rows that are searched together if there are more than two.
constexpr int FEW_GROUP = 4;

// Calls f(Constant<R>, first row, first code, number of codes) for each group of R rows and at most WIDTH / R of the
// codes [begin, end). The last group of rows may extend beyond `count`.
template <class F>
DLVAE_INLINE void for_few_groups(int64_t count, int64_t begin, int64_t end, const F& f) {
  const auto go = [&](auto group) {
    constexpr int R = decltype(group)::value, C = WIDTH / R;
    for (int64_t k = begin; k < end; k += C)
      for (int64_t r = 0; r < count; r += R) f(group, r, k, end - k < C ? end - k : C);
  };
  if (count == 1) return go(Constant<1>{});
  if (count == 2) return go(Constant<2>{});
  go(Constant<FEW_GROUP>{});
}

// Finds the nearest of codes [begin, end) for each of the rows x [count, ld] and writes it to `found`. The rows are
// padded with zeros to whole vectors, and to a multiple of FEW_GROUP rows. A code with NaN is never found, and nothing
// is found for a row that is not finite.
inline void search_few(
    const Codebook& book, const float* x, int64_t ld, int64_t count, int64_t begin, int64_t end, Found* found) {
  FewRow rows[dlvae::FEW_ROWS];
  const int64_t whole = count <= 2 ? count : (count + FEW_GROUP - 1) / FEW_GROUP * FEW_GROUP;
  for (int64_t r = 0; r < whole; ++r) {
    bool is_searched = r < count;
    for (int64_t d = 0; d < book.features; ++d) is_searched &= is_finite(x[r * ld + d]);
    rows[r] = {x + r * ld, {0, -1}, is_searched ? __builtin_inff() : -1.0f};
  }
  for_few_groups(count, begin, end, [&](auto group, int64_t r, int64_t k, int64_t n) {
    search_few_rows<decltype(group)::value>(book, ld, k, n, rows + r);
  });
  for (int64_t r = 0; r < count; ++r) found[r] = rows[r].nearest;
}

}  // namespace
