// The nearest code of each row.
//
// All scores are computed in a fast arithmetic. Each lane of a SIMD vector keeps the best score, the runner-up and the
// position of the best. An error bound of that arithmetic says how close two scores must be for rounding to change
// their order: if the runner-up is farther from the best than that, the best code is certain. Other rows are scored a
// second time, and each code that may be the nearest is compared by squared differences in float64.
#pragma once

#include "../codebook.h"
#include "arithmetic.h"
#include "bfloat16.h"
#include "dense_rows.h"
#include "distances.h"
#include "few_rows.h"
#include "int16.h"
#include "measure.h"

namespace {

// The number of words of packed codes that stay in the second-level cache while the rows of a block use them.
constexpr int64_t CHUNK_WORDS = 65536;
// The number of panels in a group; see `scan`.
constexpr int64_t GROUP = 8;

inline int64_t panels_of(const Codebook& book) { return (book.count + PANEL - 1) / PANEL; }

// Packs panels [begin, end).
template <class A>
void pack_codes(const Codebook& book, int64_t begin, int64_t end) {
  for (int64_t first = begin * PANEL; first < end * PANEL; first += WIDTH) {
    const float* codes[WIDTH];
    for (int i = 0; i < WIDTH; ++i) {
      const int64_t k = first + i;
      const double norm = k < book.count ? book.norms[k] * book.scale : 0;
      const bool counts = k < book.count && is_finite(book.peaks[k]) && norm <= LARGEST_NORM;
      codes[i] = counts ? book.centred + k * book.features : nullptr;
      const double error = A::IS_BOUND ? LowerBounds::relative_error(book) : 0;
      book.start[k] = counts ? (float)(0.5 * norm * norm * (1 - error)) : InFloat32::LARGEST;
    }
    const Floats losses = A::pack_codes(book, codes, book.words + first / PANEL * book.steps * PANEL + first % PANEL);
    for (int i = 0; i < WIDTH && first + i < book.count; ++i) book.losses[first + i] = losses[i];
  }
}

// The running minima of the scores of a row.
template <class V>
struct Lanes {
  V best, runner_up;  // the smallest score of each lane and the second smallest
  Ints where;         // the SIMD vector, or the group, of the smallest score

  DLVAE_INLINE void track(V score, Ints id) {
    runner_up = smaller(runner_up, larger(best, score));
    where = score < best ? id : where;
    best = smaller(best, score);
  }
};

// A block of rows in packed form.
template <class A>
struct Block {
  using Vector = typename A::Vector;
  static_assert(BLOCK % A::BLOCK_ROWS == 0);

  explicit Block(const Codebook& book)
      : steps(book.steps),
        ld(book.steps * A::COPIES),
        words(BLOCK * ld),
        lanes(BLOCK),
        centred(book.centre ? BLOCK * book.features : 0) {}

  int64_t count;  // number of rows, padded with zeros to a multiple of A::BLOCK_ROWS
  int64_t steps, ld;
  Buffer<uint32_t> words;  // [BLOCK, steps, COPIES]
  Buffer<Lanes<Vector>> lanes;
  Buffer<float> centred;  // [BLOCK, D]: rows minus the centre of the codebook
  Measure measure;
  float per_score;  // factor from the scale of the codes to units of a score
  // Error bound of the difference of two scores of a row, in units of a score. If A::IS_BOUND, |x|, for `search_block`.
  float margins[BLOCK];
};

// Repeats each word `copies` times, side by side.
inline void repeat_words(uint32_t* words, int64_t count, int copies) {
  for (int64_t s = count - 1; s >= 0; --s)
    for (int i = copies - 1; i >= 0; --i) words[s * copies + i] = words[s];
}

// Packs rows x [count, D].
template <class A>
void pack_rows(const Codebook& book, const float* x, int64_t count, Block<A>& block) {
  if (book.centre) {
    for (int64_t r = 0; r < count; ++r)
      for (int64_t d = 0, i = r * book.features; d < book.features; ++d, ++i) block.centred[i] = x[i] - book.centre[d];
    x = block.centred;
  }
  measure_rows(book, x, count, block.measure);
  block.count = (count + A::BLOCK_ROWS - 1) / A::BLOCK_ROWS * A::BLOCK_ROWS;
  const float unit = A::row_unit(book, block.measure);
  block.per_score = A::per_score(book, unit);
  for (int64_t r = 0; r < block.count; ++r) {
    uint32_t* words = block.words + r * block.ld;
    if (r < count && !block.measure.is_slow[r]) {
      const float norm = block.measure.norms[r];
      block.margins[r] = A::pack_row(book, x + r * book.features, unit, norm, words);
      if (A::COPIES > 1) repeat_words(words, block.steps, A::COPIES);
      if (A::IS_BOUND) continue;
      block.margins[r] += rounding_of_distances(book, norm) * block.per_score;
      // The roundings of a centred row, and twice the rounding of a centred code, in each of two scores.
      if (book.centre) block.margins[r] += 0x1.1p-22f * (norm + 0.5f * book.norm) * book.norm * block.per_score;
    } else {
      memset(words, 0, block.ld * sizeof(uint32_t));
    }
  }
}

// Whether finding the best code within one lane of a group costs less per row than examining each vector of scores.
inline bool prefers_groups(const Codebook& book) { return book.count > 32 * (book.features + 32); }

// Scores all codes. Each vector of scores updates the minima or, if GROUPED, only the lane-wise minimum of a group of
// panels does. That is less work per score, but leaves the codes in one lane of a group to be compared.
template <class A, bool GROUPED>
void scan(const Codebook& book, Block<A>& block) {
  using Vector = typename A::Vector;
  constexpr int R = GROUPED ? A::GROUPED_ROWS : A::BLOCK_ROWS;
  const int64_t panels = panels_of(book), steps = block.steps;
  const int64_t fitting = CHUNK_WORDS / (steps * PANEL) / GROUP * GROUP;
  const int64_t chunk = fitting > GROUP ? fitting : GROUP;
  Buffer<typename A::Score> converted(chunk * PANEL);
  for (int64_t r = 0; r < block.count; ++r) block.lanes[r] = {fill(A::LARGEST), fill(A::LARGEST), fill(0)};
  A::begin();
  for (int64_t p0 = 0; p0 < panels; p0 += chunk) {
    const int64_t p1 = p0 + chunk < panels ? p0 + chunk : panels;
    const auto* start = A::starts(book.start + p0 * PANEL, (p1 - p0) * PANEL, block.per_score, converted);
    for (int64_t p = p0; p < p1; p += GROUPED ? GROUP : 1) {
      for (int64_t r = 0; r < block.count; r += R) {
        const uint32_t* rows = block.words + r * block.ld;
        Lanes<Vector>* lanes = block.lanes + r;
        if constexpr (GROUPED) {
          Vector low[R];
          unroll<R>([&](auto i) { low[decltype(i)::value] = fill(A::LARGEST); });
          for (int64_t q = p; q < (p + GROUP < p1 ? p + GROUP : p1); ++q) {
            Vector sums[R][2];
            A::scores(start + (q - p0) * PANEL, rows, block.ld, book.words + q * steps * PANEL, steps, sums);
            unroll<R>([&](auto i) {
              constexpr int j = decltype(i)::value;
              low[j] = smaller(low[j], smaller(sums[j][0], sums[j][1]));
            });
          }
          const Ints id = fill((int32_t)(p / GROUP));
          unroll<R>([&](auto i) {
            constexpr int j = decltype(i)::value;
            Lanes<Vector> kept = lanes[j];
            kept.track(low[j], id);
            lanes[j] = kept;
          });
        } else {
          Vector sums[R][2];
          A::scores(start + (p - p0) * PANEL, rows, block.ld, book.words + p * steps * PANEL, steps, sums);
          const Ints id = fill((int32_t)(2 * p)), next = fill((int32_t)(2 * p + 1));
          unroll<R>([&](auto i) {
            constexpr int j = decltype(i)::value;
            Lanes<Vector> kept = lanes[j];
            kept.track(sums[j][0], id);
            kept.track(sums[j][1], next);
            lanes[j] = kept;
          });
        }
      }
    }
  }
  A::end();
}

// The nearest code so far by float64 distance. Codes are compared in ascending order.
struct Nearest {
  const Codebook& book;
  const float* x;
  int64_t index = -1;
  double distance = 0;

  void compare(int64_t k) {
    const double found = squared_distance(x, book.codes + k * book.features, book.features);
    if (index >= 0 && !(found < distance)) return;
    index = k;
    distance = found;
  }
};

// Not inlined, so that the scores stay in registers in the common case without a call.
__attribute__((noinline)) inline void compare_lanes(Ints is_close, int64_t first, Nearest& nearest) {
  for (int lane = 0; lane < WIDTH; ++lane)
    if (is_close[lane]) nearest.compare(first + lane);
}

// Compares every code of a row whose score is at most `threshold`.
template <class A>
void compare_close(
    const Codebook& book, const Block<A>& block, int64_t row, typename A::Score threshold, Nearest& nearest) {
  using Vector = typename A::Vector;
  constexpr int64_t STRIDE = 4;  // number of panels
  const int64_t panels = panels_of(book), steps = block.steps;
  Buffer<typename A::Score> converted(STRIDE * PANEL);
  const uint32_t* words = block.words + row * block.ld;
  const auto compare = [&](Vector score, int64_t first) {
    const Ints is_close = score <= threshold;
    if (any(is_close)) compare_lanes(is_close, first, nearest);
  };
  const auto compare_panels = [&](auto vectors, int64_t p) {
    constexpr int V = decltype(vectors)::value;
    Vector sums[1][V];
    const auto* start = A::starts(book.start + p * PANEL, V * WIDTH, block.per_score, converted);
    A::scores(start, words, block.ld, book.words + p * steps * PANEL, steps, sums);
    unroll<V>([&](auto v) { compare(sums[0][decltype(v)::value], p * PANEL + decltype(v)::value * WIDTH); });
  };
  int64_t p = 0;
  for (; p + STRIDE <= panels; p += STRIDE) compare_panels(Constant<2 * STRIDE>{}, p);
  for (; p < panels; ++p) compare_panels(Constant<2>{}, p);
}

// Finds the nearest code of a row that is not finite or too large for scores, or if no code is finite.
inline void search_by_differences(const Codebook& book, Nearest& nearest) {
  bool is_finite_row = true, is_nan_row = false;
  float least = InFloat32::LARGEST;
  for (int64_t d = 0; d < book.features; ++d) {
    const float value = __builtin_fabsf(nearest.x[d]);
    is_nan_row |= value != value;
    is_finite_row &= is_finite(value);
    least = value < least ? value : least;
  }
  // The features of the row are so large that float64 differences do not depend on the code.
  const bool are_equal = !book.centre && (double)least * book.scale > 0x1p54 * book.peak;
  for (int64_t k = 0; k < book.count && !is_nan_row; ++k) {
    const float peak = book.peaks[k];
    if (is_finite_row && book.any_finite ? !is_finite(peak) : peak != peak) continue;
    nearest.compare(k);
    // All distances are infinite, or all are equal.
    if (!is_finite_row || !book.any_finite || are_equal) return;
  }
  if (nearest.index < 0) nearest.index = 0;
}

// Finds the nearest codes of rows x [count, D], at most BLOCK. Returns the number of rows that were scored a second
// time.
template <class A>
int64_t search_block(const Codebook& book, const float* x, int64_t count, Block<A>& block, int64_t* indices) {
  const int64_t features = book.features;
  const bool is_grouped = prefers_groups(book), has_scores = book.any_finite;
  if (has_scores) {
    pack_rows<A>(book, x, count, block);
    (is_grouped ? scan<A, true> : scan<A, false>)(book, block);
  }
  int64_t uncertain = 0;
  for (int64_t r = 0; r < count; ++r) {
    Nearest nearest{book, x + r * features};
    if (!has_scores || block.measure.is_slow[r]) {
      search_by_differences(book, nearest);
    } else {
      const Lanes<typename A::Vector> kept = block.lanes[r];
      const auto best = lowest(kept.best);
      // The place of the best score; ties go to the lowest place.
      const Ints place = kept.best == best ? kept.where * WIDTH + counting() : fill(INT32_MAX);
      const int32_t first = lowest(place);
      const auto runner_up = lowest(place == first ? kept.runner_up : kept.best);
      // The codes [begin, end), `step` apart, one of which has the best score.
      const int64_t step = is_grouped ? WIDTH : 1;
      const int64_t begin = is_grouped ? first / WIDTH * GROUP * PANEL + first % WIDTH : first;
      const int64_t beyond = begin + (is_grouped ? GROUP * PANEL : 1), end = beyond < book.count ? beyond : book.count;
      float margin = block.margins[r];
      if constexpr (A::IS_BOUND) {
        float norm = 0;
        for (int64_t k = begin; k < end; k += step) {
          const float own = (float)(book.norms[k] * book.scale);
          // A lower bound of the score, with room for its error: longer codes cannot have the best score.
          const bool can_be_best = is_finite(book.peaks[k]) && own * (0.45f * own - 1.1f * margin) <= best;
          if (can_be_best && own > norm) norm = own;
        }
        margin = 2.01f * A::error(book, margin, norm);
      }
      const typename A::Score threshold = A::sum(best, margin);
      if (runner_up <= threshold) {
        compare_close<A>(book, block, r, threshold, nearest);
        ++uncertain;
      } else if (is_grouped) {
        for (int64_t k = begin; k < end; k += step)
          if (is_finite(book.peaks[k])) nearest.compare(k);
      } else {
        nearest.index = first;
      }
    }
    indices[r] = nearest.index;
  }
  return uncertain;
}

// Calls f(arithmetic) with the arithmetic in which this codebook is searched.
template <class F>
DLVAE_INLINE void in_arithmetic_of(const Codebook& book, const F& f) {
  if (book.is_spread) return f(LowerBounds{});
#if defined(DLVAE_AMX)
  f(InBFloat16{});
#else
#if defined(DLVAE_INT16)
  if (book.features <= InInt16::MOST_FEATURES) return f(InInt16{});
#endif
  f(InFloat32{});
#endif
}

inline int64_t packed_steps(const Codebook& book) {
  int64_t steps = 0;
  in_arithmetic_of(book, [&](auto arithmetic) { steps = decltype(arithmetic)::steps(book.features); });
  return steps;
}

inline void pack_panels(const Codebook& book, int64_t begin, int64_t end) {
  in_arithmetic_of(book, [&](auto arithmetic) { pack_codes<decltype(arithmetic)>(book, begin, end); });
}

// Calls f(first row, number of rows, contiguous float32 x, indices) for each block of rows [begin, end) after it is
// searched. Returns the number of uncertain rows.
template <class F>
DLVAE_INLINE int64_t
for_searched_blocks(const Codebook& book, const Rows& rows, int64_t begin, int64_t end, const F& f) {
  int64_t uncertain = 0;
  DenseRows dense(rows, BLOCK, true);
  int64_t indices[BLOCK];
  // Calls search(first row, x, count) for each block.
  const auto for_blocks = [&](const auto& search) {
    for (int64_t r = begin; r < end; r += BLOCK) {
      const int64_t count = r + BLOCK < end ? BLOCK : end - r;
      const float* x = dense.load(r, r + count);
      search(r, x, count);
      f(r, count, x, indices);
    }
  };
  if (book.found) {
    for_blocks([&](int64_t first, const float*, int64_t count) {
      for (int64_t r = 0; r < count; ++r) indices[r] = book.found[first + r].index;
    });
    return 0;
  }
  in_arithmetic_of(book, [&](auto arithmetic) {
    using A = decltype(arithmetic);
    Block<A> block(book);
    for_blocks(
        [&](int64_t, const float* x, int64_t count) { uncertain += search_block<A>(book, x, count, block, indices); });
  });
  return uncertain;
}

// Finds the indices and, unless null, the squared distances of rows [begin, end). Returns the number of uncertain rows.
inline int64_t search_rows(
    const Codebook& book, const Rows& rows, int64_t begin, int64_t end, int64_t step, int64_t* indices,
    float* distances) {
  const auto write = [&](int64_t first, int64_t count, const float* x, const int64_t* found) {
    for (int64_t r = 0; r < count; ++r, x += book.features) {
      indices[(first + r) * step] = found[r];
      if (distances)
        distances[(first + r) * step] =
            (float)squared_distance(x, book.codes + found[r] * book.features, book.features);
    }
  };
  return for_searched_blocks(book, rows, begin, end, write);
}

// Computes scores of the same few rows and codes, which stay in the first-level cache, repeatedly. Returns the number
// of products of two features. This measures the peak rate of a core.
inline int64_t repeat_scores(int64_t rounds) {
  constexpr int64_t FEATURES = 128;
  Codebook book{};
  book.features = FEATURES;
  int64_t products = 0;
  in_arithmetic_of(book, [&](auto arithmetic) {
    using A = decltype(arithmetic);
    const int64_t steps = A::steps(FEATURES);
    const int64_t ld = steps * A::COPIES;
    Buffer<uint32_t> rows(A::BLOCK_ROWS * ld), codes(PANEL * steps);
    Buffer<typename A::Score> start(PANEL);
    memset(rows, 0, A::BLOCK_ROWS * ld * sizeof(uint32_t));
    memset(codes, 0, PANEL * steps * sizeof(uint32_t));
    memset(start, 0, PANEL * sizeof(typename A::Score));
    typename A::Vector total = {};
    A::begin();
    for (int64_t i = 0; i < rounds; ++i) {
      typename A::Vector sums[A::BLOCK_ROWS][2];
      A::scores(start, rows, ld, codes, steps, sums);
      unroll<A::BLOCK_ROWS>([&](auto r) { total += sums[decltype(r)::value][0] + sums[decltype(r)::value][1]; });
      // This hides from the compiler that nothing changes between rounds and that nothing reads the sum.
      asm volatile("" ::: "memory");
    }
    A::end();
    start[0] = total[0];
    asm volatile("" ::: "memory");
    products = rounds * A::BLOCK_ROWS * PANEL * FEATURES;
  });
  return products;
}

}  // namespace
