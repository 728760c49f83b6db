// The nearest code of each row.
//
// All scores are found in a fast arithmetic, of which each lane of a vector keeps the best, the second best and where
// the best was. A bound on the rounding of that arithmetic tells how far below another score a code may truly lie: where
// the second best is farther off than that, the best is certain. Other rows go through the scores again, and every code
// that may be the nearest is compared by its difference from the row in float64.
#pragma once

#include "../codebook.h"
#include "arithmetic.h"
#include "buffer.h"
#include "rows.h"

namespace {

using dlvae::BLOCK;
static_assert(BLOCK % ROWS == 0);
// Words of packed codes that stay in the second cache while the rows of a block go by.
constexpr int64_t CHUNK_WORDS = 65536;
// Panels of one group, see `scan`.
constexpr int64_t GROUP = 8;
// A row is searched by differences if one of its features is larger than this, in the scale of the codes.
constexpr float LARGEST_FEATURE = 0x1p40f;

inline int64_t panels_of(const Codebook& book) { return (book.count + PANEL - 1) / PANEL; }

DLVAE_INLINE bool is_finite(float value) { return value - value == 0; }

// |x - c|^2.
inline double squared_distance(const float* x, const float* c, int64_t features) {
  constexpr int64_t STEP = WIDTH / 2;
  Doubles sums[2] = {};
  int64_t d = 0;
  for (; d + 2 * STEP <= features; d += 2 * STEP) {
    unroll<2>([&](auto i) {
      const int64_t at = d + decltype(i)::value * STEP;
      const Doubles difference = widen(x + at) - widen(c + at);
      sums[decltype(i)::value] += difference * difference;
    });
  }
  double rest = 0;
  for (; d < features; ++d) {
    const double difference = (double)x[d] - (double)c[d];
    rest += difference * difference;
  }
  return total(sums[0] + sums[1]) + rest;
}

// The peaks and norms of codes [begin, end), both before any scaling.
inline void measure_codes(const Codebook& book, int64_t begin, int64_t end) {
  for (int64_t k = begin; k < end; ++k) {
    const float* code = book.codes + k * book.features;
    float peak = 0;
    double square = 0;
    bool has_nan = false;
    for (int64_t d = 0; d < book.features; ++d) {
      const float size = __builtin_fabsf(code[d]);
      has_nan |= size != size;
      peak = size > peak ? size : peak;
      square += (double)size * size;
    }
    book.peaks[k] = has_nan ? __builtin_nanf("") : peak;
    book.norms[k] = is_finite(book.peaks[k]) ? __builtin_sqrt(square) : 0;
  }
}

// What one integer is worth in a packed code: as large a part of a code as of a row that is as long, if their product is
// to stay below 2^31.
inline float code_unit(const Codebook& book) {
  const float unit = book.norm * 2.9e-5f, least = book.peak / 32767;
  return unit > least ? unit : least > 0 ? least : 1;
}

// Packs panels [begin, end).
template <class A>
void pack_codes(const Codebook& book, int64_t begin, int64_t end) {
  const float unit = code_unit(book), inverse = 1 / unit;
  for (int64_t panel = begin; panel < end; ++panel) {
    uint32_t* words = book.words + panel * book.steps * PANEL;
    memset(words, 0, book.steps * PANEL * sizeof(uint32_t));
    for (int64_t j = 0; j < PANEL; ++j) {
      const int64_t k = panel * PANEL + j;
      if (k >= book.count || !is_finite(book.peaks[k])) {
        book.start[k] = InFloat32::LARGEST;
        if (k < book.count) book.losses[k] = 0;
        continue;
      }
      const float* code = book.codes + k * book.features;
      float lost = 0;
      for (int64_t d = 0; d < book.features; ++d) {
        const float value = code[d] * book.scale;
        if constexpr (__is_same(A, InFloat32)) {
          words[d * PANEL + j] = as_bits(-value);
        } else {
          const float whole = __builtin_nearbyintf(value * inverse), difference = value - whole * unit;
          lost += difference * difference;
          const uint16_t bits = (uint16_t)(int16_t)-whole;
          words[d / 2 * PANEL + j] |= (uint32_t)bits << d % 2 * 16;
        }
      }
      const double norm = book.norms[k] * book.scale;
      book.start[k] = (float)(0.5 * norm * norm);
      book.losses[k] = __builtin_sqrtf(lost) * 1.0005f;
    }
  }
}

// What is kept of the scores of a row.
template <class V>
struct Lanes {
  V best, second;  // in each lane the smallest score and the smallest but that,
  Ints where;      // and the vector, or the group, of the smallest

  DLVAE_INLINE void track(V score, Ints id) {
    second = smaller(second, larger(best, score));
    where = score < best ? id : where;
    best = smaller(best, score);
  }
};

// Rows of a block as the search takes them.
template <class A>
struct Block {
  using Vector = typename A::Vector;

  explicit Block(const Codebook& book) : steps(book.steps), words(BLOCK * book.steps), lanes(BLOCK) {}

  int64_t count;  // rows, padded with zeros to a multiple of ROWS
  int64_t steps;
  Buffer<uint32_t> words;   // [BLOCK, steps]
  Buffer<Lanes<Vector>> lanes;
  float per_unit;           // from scores in the scale of the codes to those of A
  float margins[BLOCK];     // how much two scores of a row may differ by rounding, in the unit of A
  bool is_slow[BLOCK];      // searched by differences
};

// What the packing of rows must know of them, in the scale of the codes.
struct Measure {
  float peak = 0, norm = 0;  // the largest of all rows that are not slow
  float norms[BLOCK];        // |x|, or more; 0 of a slow row
};

inline void measure_rows(const Codebook& book, const float* x, int64_t count, bool* is_slow, Measure& measure) {
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
    // NaN and infinity show in the sum alone.
    is_slow[r] = !(sum < LARGEST_FEATURE * LARGEST_FEATURE);
    measure.norms[r] = is_slow[r] ? 0 : __builtin_sqrtf(sum) * 1.0005f + 0x1p-60f;
    if (is_slow[r]) continue;
    peaks = larger(peaks, larger(highs, fill(high)));
    measure.norm = measure.norms[r] > measure.norm ? measure.norms[r] : measure.norm;
  }
  measure.peak = -lowest(-peaks);
}

// Features of rows x [count, D] as words, in the scale of the codes, and the bounds on the error of their scores.
template <class A>
void pack_rows(const Codebook& book, const float* x, int64_t count, Block<A>& block) {
  const int64_t features = book.features, bytes = block.steps * sizeof(uint32_t);
  Measure rows;
  measure_rows(book, x, count, block.is_slow, rows);
  block.count = (count + ROWS - 1) / ROWS * ROWS;
  memset(block.words + count * block.steps, 0, (block.count - count) * bytes);
  const float half_square = 0.5f * book.norm * book.norm;
  if constexpr (__is_same(A, InFloat32)) {
    block.per_unit = 1;
    for (int64_t r = 0; r < count; ++r) {
      float* words = (float*)(block.words + r * block.steps);
      if (block.is_slow[r]) {
        memset(words, 0, bytes);
      } else {
        for (int64_t d = 0; d < features; ++d) words[d] = x[r * features + d] * book.scale;
      }
      // D + 2 roundings of partial sums, in each of two scores.
      block.margins[r] = (features + 2) * 0x1.2p-23f * (half_square + rows.norms[r] * book.norm) + 0x1p-120f;
    }
  } else {
    // Scores and their partial sums stay below 2^31.
    const float unit = code_unit(book);
    float row_unit = (rows.norm * book.norm + half_square) / 1.8e9f / unit;
    if (row_unit < rows.peak / 32767) row_unit = rows.peak / 32767;
    if (!(row_unit > 0)) row_unit = 1;
    block.per_unit = 1 / (row_unit * unit);
    for (int64_t r = 0; r < count; ++r) {
      uint32_t* words = block.words + r * block.steps;
      if (block.is_slow[r]) {
        memset(words, 0, bytes);
        block.margins[r] = 0;
        continue;
      }
      const float norm = rows.norms[r];
      const float loss = A::pack_row(x + r * features, features, book.scale, row_unit, words) + 0x1p-21f * norm;
      const float error = loss * book.norm + (norm + loss) * book.loss + 0x1p-21f * half_square;
      block.margins[r] = 2.01f * error * block.per_unit + 4;
    }
  }
}

// Whether telling the codes of a lane apart costs a row less than looking at each vector.
inline bool prefers_groups(const Codebook& book) { return book.count > 32 * (book.features + 32); }

// The starts of panels [begin, end) in the unit of A: those of the codebook, or converted to `converted`.
template <class A>
const typename A::Score* starts(
    const Codebook& book, const Block<A>& block, int64_t begin, int64_t end, typename A::Score* converted) {
  if constexpr (__is_same(A, InFloat32)) {
    return book.start + begin * PANEL;
  } else {
    for (int64_t i = 0; i < (end - begin) * PANEL; i += WIDTH) {
      const Floats start = load<Floats>(book.start + begin * PANEL + i);
      const Ints whole = A::round(start * block.per_unit);
      store(converted + i, start < InFloat32::LARGEST ? whole : fill(A::LARGEST));
    }
    return converted;
  }
}

// Goes through all codes. Each vector of scores is looked at by itself, or, if GROUPED, the smallest scores of a group of
// panels in each lane: that is less work for each, and leaves the codes of one lane of a group to be told apart.
template <class A, bool GROUPED>
void scan(const Codebook& book, Block<A>& block) {
  using Vector = typename A::Vector;
  const int64_t panels = panels_of(book), steps = block.steps;
  const int64_t fitting = CHUNK_WORDS / (steps * PANEL) / GROUP * GROUP;
  const int64_t chunk = fitting > GROUP ? fitting : GROUP;
  Buffer<typename A::Score> converted(__is_same(A, InFloat32) ? 0 : chunk * PANEL);
  for (int64_t r = 0; r < block.count; ++r) block.lanes[r] = {fill(A::LARGEST), fill(A::LARGEST), fill(0)};
  for (int64_t p0 = 0; p0 < panels; p0 += chunk) {
    const int64_t p1 = p0 + chunk < panels ? p0 + chunk : panels;
    const typename A::Score* start = starts<A>(book, block, p0, p1, converted);
    for (int64_t p = p0; p < p1; p += GROUPED ? GROUP : 1) {
      for (int64_t r = 0; r < block.count; r += ROWS) {
        const uint32_t* rows = block.words + r * steps;
        Lanes<Vector>* lanes = block.lanes + r;
        if constexpr (GROUPED) {
          Vector low[ROWS];
          unroll<ROWS>([&](auto i) { low[decltype(i)::value] = fill(A::LARGEST); });
          for (int64_t q = p; q < (p + GROUP < p1 ? p + GROUP : p1); ++q) {
            Vector sums[ROWS][2];
            begin_scores<A>(start + (q - p0) * PANEL, sums);
            add_products<A>(rows, steps, book.words + q * steps * PANEL, steps, sums);
            unroll<ROWS>([&](auto i) {
              constexpr int j = decltype(i)::value;
              low[j] = smaller(low[j], smaller(sums[j][0], sums[j][1]));
            });
          }
          const Ints id = fill((int32_t)(p / GROUP));
          unroll<ROWS>([&](auto i) {
            constexpr int j = decltype(i)::value;
            Lanes<Vector> kept = lanes[j];
            kept.track(low[j], id);
            lanes[j] = kept;
          });
        } else {
          Vector sums[ROWS][2];
          begin_scores<A>(start + (p - p0) * PANEL, sums);
          add_products<A>(rows, steps, book.words + p * steps * PANEL, steps, sums);
          const Ints id = fill((int32_t)(2 * p)), next = fill((int32_t)(2 * p + 1));
          unroll<ROWS>([&](auto i) {
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
}

// The nearest so far, by float64 distance; codes come in ascending order.
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

// Out of line, so that scores stay in registers on the way past it.
__attribute__((noinline)) inline void compare_lanes(Ints is_close, int64_t first, Nearest& nearest) {
  for (int lane = 0; lane < WIDTH; ++lane)
    if (is_close[lane]) nearest.compare(first + lane);
}

// Compares every code of a row whose score is at most `threshold`.
template <class A>
void compare_close(const Codebook& book, const Block<A>& block, int64_t row, typename A::Score threshold, Nearest& nearest) {
  using Vector = typename A::Vector;
  constexpr int64_t STRIDE = 4;  // panels
  const int64_t panels = panels_of(book), steps = block.steps;
  Buffer<typename A::Score> converted(STRIDE * PANEL);
  const uint32_t* words = block.words + row * steps;
  const auto compare = [&](Vector score, int64_t first) {
    const Ints is_close = score <= threshold;
    if (any(is_close)) compare_lanes(is_close, first, nearest);
  };
  int64_t p = 0;
  for (; p + STRIDE <= panels; p += STRIDE) {
    Vector sums[1][2 * STRIDE];
    begin_scores<A>(starts<A>(book, block, p, p + STRIDE, converted), sums);
    add_products<A>(words, steps, book.words + p * steps * PANEL, steps, sums);
    unroll<2 * STRIDE>([&](auto v) { compare(sums[0][decltype(v)::value], p * PANEL + decltype(v)::value * WIDTH); });
  }
  for (; p < panels; ++p) {
    Vector sums[1][2];
    begin_scores<A>(starts<A>(book, block, p, p + 1, converted), sums);
    add_products<A>(words, steps, book.words + p * steps * PANEL, steps, sums);
    unroll<2>([&](auto v) { compare(sums[0][decltype(v)::value], p * PANEL + decltype(v)::value * WIDTH); });
  }
}

// A row that is not finite or too large for any other way.
inline void search_slowly(const Codebook& book, Nearest& nearest) {
  bool is_finite_row = true;
  for (int64_t d = 0; d < book.features; ++d) {
    if (nearest.x[d] != nearest.x[d]) nearest.index = 0;
    is_finite_row &= is_finite(nearest.x[d]);
  }
  if (nearest.index == 0) return;
  // Of infinite distances, which all differ from no other, the first code that holds no NaN will do.
  for (int64_t k = 0; k < book.count; ++k)
    if (book.any_finite ? is_finite(book.peaks[k]) : book.peaks[k] == book.peaks[k]) {
      if (is_finite_row && book.any_finite) {
        nearest.compare(k);
      } else {
        nearest.index = k;
        return;
      }
    }
  if (nearest.index < 0) nearest.index = 0;
}

// The nearest codes of rows x [count, D], at most BLOCK; also their squared distances where `distances` is not null.
template <class A>
void search_block(
    const Codebook& book, const float* x, int64_t count, Block<A>& block, int64_t* indices, float* distances) {
  const int64_t features = book.features;
  pack_rows<A>(book, x, count, block);
  const bool is_grouped = prefers_groups(book);
  if (book.any_finite) (is_grouped ? scan<A, true> : scan<A, false>)(book, block);
  for (int64_t r = 0; r < count; ++r) {
    Nearest nearest{book, x + r * features};
    if (block.is_slow[r] || !book.any_finite) {
      search_slowly(book, nearest);
    } else {
      const Lanes<typename A::Vector> kept = block.lanes[r];
      const auto best = lowest(kept.best);
      // The place of the best: of equal ones the first.
      const Ints place = kept.best == best ? kept.where * WIDTH + counting() : fill(INT32_MAX);
      const int32_t first = lowest(place);
      const auto second = lowest(place == first ? kept.second : kept.best);
      const typename A::Score threshold = A::sum(best, block.margins[r]);
      if (second <= threshold) {
        compare_close<A>(book, block, r, threshold, nearest);
      } else if (is_grouped) {
        const int64_t lane = first % WIDTH, begin = first / WIDTH * GROUP * PANEL;
        const int64_t end = begin + GROUP * PANEL < book.count ? begin + GROUP * PANEL : book.count;
        for (int64_t k = begin + lane; k < end; k += WIDTH)
          if (is_finite(book.peaks[k])) nearest.compare(k);
      } else {
        nearest.index = first;
      }
    }
    indices[r] = nearest.index;
    if (distances)
      distances[r] = (float)squared_distance(nearest.x, book.codes + nearest.index * features, features);
  }
}

// Calls f(an arithmetic) with the one in which this codebook is searched.
template <class F>
DLVAE_INLINE void in_arithmetic_of(const Codebook& book, const F& f) {
#if defined(DLVAE_VNNI)
  // Of longer rows the sums of what is rounded off might overflow.
  if (book.features <= 8192) return f(InInt16{});
#endif
  f(InFloat32{});
}

inline int64_t packed_steps(const Codebook& book) {
  int64_t steps = 0;
  in_arithmetic_of(book, [&](auto arithmetic) { steps = decltype(arithmetic)::steps(book.features); });
  return steps;
}

inline void pack_panels(const Codebook& book, int64_t begin, int64_t end) {
  in_arithmetic_of(book, [&](auto arithmetic) { pack_codes<decltype(arithmetic)>(book, begin, end); });
}

// Calls f(first row, rows, x as adjacent float32, their indices) for each block of rows [begin, end), once searched.
template <class F>
DLVAE_INLINE void for_searched_blocks(
    const Codebook& book, const Rows& rows, int64_t begin, int64_t end, int64_t* indices, float* distances, const F& f) {
  in_arithmetic_of(book, [&](auto arithmetic) {
    using A = decltype(arithmetic);
    Block<A> block(book);
    Buffer<float> copy(adjacent_rows(rows, 0) ? 0 : BLOCK * book.features);
    for (int64_t r = begin; r < end; r += BLOCK) {
      const int64_t count = r + BLOCK < end ? BLOCK : end - r;
      const float* x = adjacent_rows(rows, r);
      if (!x) {
        load_rows(rows, r, r + count, copy, book.features);
        x = copy;
      }
      search_block<A>(book, x, count, block, indices + r, distances ? distances + r : nullptr);
      f(r, count, x);
    }
  });
}

// Indices and, unless null, squared distances of rows [begin, end).
inline void search_rows(
    const Codebook& book, const Rows& rows, int64_t begin, int64_t end, int64_t* indices, float* distances) {
  for_searched_blocks(book, rows, begin, end, indices, distances, [](int64_t, int64_t, const float*) {});
}

}  // namespace
