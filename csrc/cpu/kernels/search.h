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

// Rows that go through the codebook together, a multiple of ROWS.
constexpr int64_t BLOCK = 64;
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

// |v|^2.
inline double squared_norm(const float* v, int64_t features) {
  constexpr int64_t STEP = WIDTH / 2;
  Doubles sum = {};
  int64_t d = 0;
  for (; d + STEP <= features; d += STEP) {
    const Doubles part = widen(v + d);
    sum += part * part;
  }
  double rest = 0;
  for (; d < features; ++d) rest += (double)v[d] * (double)v[d];
  return total(sum) + rest;
}

// The largest magnitude; NaN if there is one.
inline float peak_of(const float* v, int64_t features) {
  float peak = 0;
  bool has_nan = false;
  for (int64_t d = 0; d < features; ++d) {
    const float size = __builtin_fabsf(v[d]);
    has_nan |= size != size;
    peak = size > peak ? size : peak;
  }
  return has_nan ? __builtin_nanf("") : peak;
}

inline void measure_codes(const Codebook& book, int64_t begin, int64_t end) {
  for (int64_t k = begin; k < end; ++k) book.peaks[k] = peak_of(book.codes + k * book.features, book.features);
}

// The square root of a bound, and still one in float32.
inline float root_above(double square) { return (float)(__builtin_sqrt(square) * (1 + 0x1p-22)); }

// What one integer is worth in a packed code.
inline float code_unit(const Codebook& book) {
  const float peak = book.peak * book.scale;
  return peak > 0 ? peak / 32767 : 1;
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
        if (k < book.count) book.norms[k] = book.losses[k] = 0;
        continue;
      }
      const float* code = book.codes + k * book.features;
      double square = 0, lost = 0;
      for (int64_t d = 0; d < book.features; ++d) {
        const float value = code[d] * book.scale;
        square += (double)value * value;
        if constexpr (sizeof(typename A::Feature) == 4) {
          words[d * PANEL + j] = as_bits(-value);
        } else {
          const float whole = __builtin_nearbyintf(value * inverse);
          const double difference = (double)value - (double)whole * unit;
          lost += difference * difference;
          const uint16_t bits = (uint16_t)(int16_t)-whole;
          words[d / 2 * PANEL + j] |= (uint32_t)bits << d % 2 * 16;
        }
      }
      book.start[k] = (float)(0.5 * square);
      book.norms[k] = root_above(square);
      book.losses[k] = root_above(lost);
    }
  }
}

// Rows of a block as the search takes them.
template <class A>
struct Block {
  using Vector = typename A::Vector;

  Block(const Codebook& book) : steps(book.steps), words(BLOCK * book.steps), best(BLOCK), second(BLOCK), where(BLOCK) {}

  int64_t count;  // rows, padded with zeros to a multiple of ROWS
  int64_t steps;
  Buffer<uint32_t> words;   // [BLOCK, steps]
  Buffer<Vector> best;      // of each row and lane the smallest score,
  Buffer<Vector> second;    // the smallest but that,
  Buffer<Ints> where;       // and the vector, or the group, of the smallest
  float inverse_unit;       // from scores in the scale of the codes to those of A
  float margins[BLOCK];     // how much two scores of a row may differ by rounding, in the unit of A
  bool is_slow[BLOCK];      // searched by differences
};

// The integers of a row, in pairs; returns the square of what is lost.
inline double pack_integers(
    const float* x, int64_t features, float scale, float unit, float inverse, uint32_t* words) {
  float lost = 0;
  int64_t d = 0;
  int16_t* whole = (int16_t*)words;
#if defined(DLVAE_AVX512)
  Floats sum = {};
  for (; d + WIDTH <= features; d += WIDTH) {
    const Floats value = load<Floats>(x + d) * scale;
    const __m512i rounded = _mm512_cvtps_epi32(value * inverse);
    _mm256_storeu_si256((__m256i*)(whole + d), _mm512_cvtsepi32_epi16(rounded));
    const Floats difference = value - (Floats)_mm512_cvtepi32_ps(rounded) * unit;
    sum += difference * difference;
  }
  for (int i = 0; i < WIDTH; ++i) lost += sum[i];
#endif
  for (; d < features; ++d) {
    const float value = x[d] * scale, rounded = __builtin_nearbyintf(value * inverse);
    whole[d] = (int16_t)rounded;
    const float difference = value - rounded * unit;
    lost += difference * difference;
  }
  if (features % 2) whole[features] = 0;
  return (double)lost * (1 + 0x1p-10);
}

// Features of rows x [count, D] as words, in the scale of the codes, and the bounds on the error of their scores.
template <class A>
void pack_rows(const Codebook& book, const float* x, int64_t count, Block<A>& block) {
  const int64_t features = book.features;
  float norms[BLOCK];
  float peak = 0, norm = 0;
  for (int64_t r = 0; r < count; ++r) {
    const float row_peak = peak_of(x + r * features, features) * book.scale;
    block.is_slow[r] = !(row_peak < LARGEST_FEATURE);
    norms[r] = block.is_slow[r] ? 0 : root_above(squared_norm(x + r * features, features)) * book.scale;
    if (block.is_slow[r]) continue;
    peak = row_peak > peak ? row_peak : peak;
    norm = norms[r] > norm ? norms[r] : norm;
  }
  block.count = (count + ROWS - 1) / ROWS * ROWS;
  memset(block.words + count * block.steps, 0, (block.count - count) * block.steps * sizeof(uint32_t));
  const float half_square = 0.5f * book.norm * book.norm;
  if constexpr (sizeof(typename A::Feature) == 4) {
    block.inverse_unit = 1;
    for (int64_t r = 0; r < count; ++r) {
      uint32_t* words = block.words + r * block.steps;
      if (block.is_slow[r]) {
        memset(words, 0, block.steps * sizeof(uint32_t));
      } else {
        for (int64_t d = 0; d < features; ++d) words[d] = as_bits(x[r * features + d] * book.scale);
      }
      // D + 2 roundings of partial sums, in each of two scores.
      block.margins[r] = (features + 2) * 0x1.2p-23f * (half_square + norms[r] * book.norm) + 0x1p-120f;
    }
  } else {
    // Scores and their partial sums stay below 2^31.
    const float unit = code_unit(book), largest = norm * book.norm + half_square;
    float row_unit = largest / 2e9f / unit;
    if (row_unit < peak / 32767) row_unit = peak / 32767;
    if (!(row_unit > 0)) row_unit = 1;
    const float inverse = 1 / row_unit;
    block.inverse_unit = 1 / (row_unit * unit);
    for (int64_t r = 0; r < count; ++r) {
      uint32_t* words = block.words + r * block.steps;
      if (block.is_slow[r]) {
        memset(words, 0, block.steps * sizeof(uint32_t));
        block.margins[r] = 0;
        continue;
      }
      const double lost = pack_integers(x + r * features, features, book.scale, row_unit, inverse, words);
      const float loss = root_above(lost) + 0x1p-21f * norms[r];
      const float error = loss * book.norm + (norms[r] + loss) * book.loss + 0x1p-21f * half_square;
      block.margins[r] = 2.01f * error * block.inverse_unit + 4;
    }
  }
}

template <class V>
DLVAE_INLINE void track(V score, Ints id, V& best, V& second, Ints& where) {
  second = smaller(second, larger(best, score));
  where = score < best ? id : where;
  best = smaller(best, score);
}

// Whether telling the codes of a lane apart costs a row less than looking at each vector.
inline bool prefers_groups(const Codebook& book) { return book.count > 32 * (book.features + 32); }

// The starts of panels [begin, end) in the unit of A: those of the codebook, or converted to `converted`.
template <class A>
const typename A::Score* starts(
    const Codebook& book, const Block<A>& block, int64_t begin, int64_t end, typename A::Score* converted) {
  if constexpr (sizeof(typename A::Feature) == 4) {
    return book.start + begin * PANEL;
  } else {
    for (int64_t i = 0; i < (end - begin) * PANEL; i += WIDTH) {
      const Floats start = load<Floats>(book.start + begin * PANEL + i);
      const Ints whole = A::round(start * block.inverse_unit);
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
  Buffer<typename A::Score> converted(sizeof(typename A::Feature) == 4 ? 0 : chunk * PANEL);
  for (int64_t r = 0; r < block.count; ++r) {
    block.best[r] = block.second[r] = fill(A::LARGEST);
    block.where[r] = fill(0);
  }
  for (int64_t p0 = 0; p0 < panels; p0 += chunk) {
    const int64_t p1 = p0 + chunk < panels ? p0 + chunk : panels;
    const typename A::Score* start = starts<A>(book, block, p0, p1, converted);
    for (int64_t r = 0; r < block.count; r += ROWS) {
      const uint32_t* rows = block.words + r * steps;
      Vector* best = block.best + r;
      Vector* second = block.second + r;
      Ints* where = block.where + r;
      if constexpr (GROUPED) {
        for (int64_t g = p0; g < p1; g += GROUP) {
          const int64_t end = g + GROUP < p1 ? g + GROUP : p1;
          Vector low[ROWS];
          unroll<ROWS>([&](auto i) { low[decltype(i)::value] = fill(A::LARGEST); });
          for (int64_t p = g; p < end; ++p) {
            Vector sums[ROWS][2];
            begin_scores<A>(start + (p - p0) * PANEL, sums);
            add_products<A>(rows, steps, book.words + p * steps * PANEL, steps, sums);
            unroll<ROWS>([&](auto i) {
              constexpr int j = decltype(i)::value;
              low[j] = smaller(low[j], smaller(sums[j][0], sums[j][1]));
            });
          }
          const Ints id = fill((int32_t)(g / GROUP));
          unroll<ROWS>([&](auto i) {
            constexpr int j = decltype(i)::value;
            track(low[j], id, best[j], second[j], where[j]);
          });
        }
      } else {
        for (int64_t p = p0; p < p1; ++p) {
          Vector sums[ROWS][2];
          begin_scores<A>(start + (p - p0) * PANEL, sums);
          add_products<A>(rows, steps, book.words + p * steps * PANEL, steps, sums);
          const Ints id = fill((int32_t)(2 * p)), next = fill((int32_t)(2 * p + 1));
          unroll<ROWS>([&](auto i) {
            constexpr int j = decltype(i)::value;
            track(sums[j][0], id, best[j], second[j], where[j]);
            track(sums[j][1], next, best[j], second[j], where[j]);
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
    if (!any(is_close)) return;
    for (int lane = 0; lane < WIDTH; ++lane)
      if (is_close[lane]) nearest.compare(first + lane);
  };
  int64_t p = 0;
  for (; p + STRIDE <= panels; p += STRIDE) {
    Vector sums[1][2 * STRIDE];
    begin_scores<A>(starts<A>(book, block, p, p + STRIDE, converted), sums);
    add_products<A>(words, steps, book.words + p * steps * PANEL, steps, sums);
    for (int v = 0; v < 2 * STRIDE; ++v) compare(sums[0][v], p * PANEL + v * WIDTH);
  }
  for (; p < panels; ++p) {
    Vector sums[1][2];
    begin_scores<A>(starts<A>(book, block, p, p + 1, converted), sums);
    add_products<A>(words, steps, book.words + p * steps * PANEL, steps, sums);
    for (int v = 0; v < 2; ++v) compare(sums[0][v], p * PANEL + v * WIDTH);
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
      const auto best = lowest(block.best[r]);
      // The place of the best: of equal ones the first.
      const Ints place = block.best[r] == best ? block.where[r] * WIDTH + counting() : fill(INT32_MAX);
      const int32_t first = lowest(place);
      const auto second = lowest(place == first ? block.second[r] : block.best[r]);
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

// Indices and, unless null, squared distances of rows [begin, end).
template <class A>
void search_rows(
    const Codebook& book, const Rows& rows, int64_t begin, int64_t end, int64_t* indices, float* distances) {
  Block<A> block(book);
  Buffer<float> x(BLOCK * book.features);
  for (int64_t r = begin; r < end; r += BLOCK) {
    const int64_t count = r + BLOCK < end ? BLOCK : end - r;
    load_rows(rows, r, r + count, x, book.features);
    search_block<A>(book, x, count, block, indices + r, distances ? distances + r : nullptr);
  }
}

}  // namespace
