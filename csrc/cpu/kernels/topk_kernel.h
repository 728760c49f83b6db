// The k best codes of each row.
//
// Scores are computed in float32, a block of rows and a chunk of codes at a time. Each row keeps the codes whose score
// may be among its k best according to an error bound. The kept codes are sorted by score. Neighbours within the error
// bound of each other are compared in float64, each pair of a row and a code separately. Of equal codes only the first
// is searched; the others follow it in the result. docs/numerics.md, section 8.1, derives the bound.
#pragma once

#include "../topk.h"
#include "few_topk.h"
#include "order.h"
#include "product.h"

namespace {

constexpr int64_t CODES = 512;            // number of codes in a chunk: whole panels
constexpr int64_t SORTED_BY_RANKS = 512;  // above this number, radix sort is faster
constexpr float LARGEST_SCORE = 0x1p100f;

inline void pack_topk(const Topk& t, int64_t begin, int64_t end, float* panels) {
  pack_transposed(t.centred, t.ids, t.packed, t.features, -t.scale, begin, end, panels);
}

// The scratch memory of a thread, and the search of its rows.
class TopkSearch {
 public:
  explicit TopkSearch(const Topk& t)
      : t_(t),
        wanted_(t.k < t.packed + t.apart ? t.k : t.packed + t.apart),
        room_(wanted_ + wanted_ / 2 + 128),
        capacity_((room_ + t.apart + CODES + 8 * WIDTH) / WIDTH * WIDTH),
        is_one_chunk_(t.packed <= CODES),
        block_(rows_of_block(t)),
        x_(block_ * t.features),
        centred_(t.centre && !t.is_product ? block_ * t.features : 0),
        scores_(block_ * CODES),
        kept_(block_),
        found_(capacity_ * (is_one_chunk_ ? 1 : block_)),
        places_(capacity_ * (is_one_chunk_ ? 1 : block_)),
        sorted_(capacity_),
        sorted_places_(capacity_),
        centre_norm_(t.centre ? __builtin_sqrt(squared_norm(t.centre, t.features)) : 0),
        exact_(t.count),
        merged_(t.count),
        known_(t.next ? wanted_ : 0),
        firsts_(t.next ? wanted_ : 0) {}

  void run(int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r += block_) search(r, r + block_ < end ? block_ : end - r);
  }

 private:
  struct Kept {
    int64_t count;
    float bound;    // at least k scores are at most this
    float margin;   // error bound of a score, without the part that is proportional to the score
    double square;  // |x|^2
    double offset;  // the distance, or the product, that is added to the value of the score
    bool is_exact;  // whether all codes are compared in float64
    double unit;    // unit of a score in float64; rows of subnormal numbers are scaled up
  };

  static int64_t rows_of_block(const Topk& t) {
    const int64_t fitting = 65536 / t.features / ROWS * ROWS;
    return fitting < 2 * ROWS ? 2 * ROWS : fitting > 128 ? 128 : fitting;
  }

  // The part of the error bound of a score that is proportional to the score.
  static DLVAE_INLINE float own_error(float score) { return 4 * (float)ROUNDING * __builtin_fabsf(score); }

  // Returns a limit: a code with a higher score is worse than one with the score `bound`.
  static float limit_of(float bound, float margin) {
    const float sum = bound + (2 * margin + 2 * own_error(bound));
    return sum + 2 * own_error(sum);
  }

  void measure(const float* x, Kept& row) const {
    const int64_t chain = t_.features < CHAIN ? t_.features : CHAIN;
    const double terms = (double)(chain + t_.features / CHAIN + 8);
    row.square = squared_norm(x, t_.features);
    row.is_exact = !(row.square < 0x1p180) || t_.packed == 0;
    const double size = __builtin_sqrt(row.square), longest = 2 * terms * size * (double)t_.scale;
    // If a code is far longer than the row, the proportional part of the bound covers the error of its square.
    const double norm = !t_.is_product && longest < t_.norm ? longest : t_.norm;
    double margin = 1.01 * ROUNDING * terms * norm * size;
    // Products below the smallest normal number add to the error. If the row is so long that float64 does not
    // distinguish two distances, their codes must tie.
    margin += (double)t_.features * 0x1p-120;
    if (!t_.is_product) margin += (double)(t_.features + 2) * 0x1p-53 * row.square * (double)t_.scale;
    // The roundings of a centred row, of a centred code, and of its square.
    if (t_.centre) margin += 0x1.1p-23 * t_.norm * (size + t_.norm / (double)t_.scale / 2);
    // Products with the centre are among the terms that float64 rounds.
    if (t_.is_product) margin += (double)(t_.features + 2) * 0x1p-53 * centre_norm_ * size * (double)t_.scale;
    row.margin = (float)margin;
    row.count = 0;
    row.bound = LARGEST_SCORE;
  }

  void search(int64_t first, int64_t count) {
    const int64_t features = t_.features;
    load_rows(t_.x, first, first + count, x_, features);
    const int64_t whole = whole_tiles(count);
    for (int64_t i = count * features; i < whole * features; ++i) x_[i] = 0;
    const float* scored = x_;
    if (t_.centre && !t_.is_product) {
      for (int64_t r = 0; r < whole; ++r)
        for (int64_t d = 0, i = r * features; d < features; ++d, ++i) centred_[i] = x_[i] - t_.centre[d];
      scored = centred_;
    }
    for (int64_t r = 0; r < count; ++r) {
      const float* x = x_ + r * features;
      scale_up(x_ + r * features, kept_[r]);
      measure(scored + r * features, kept_[r]);
      kept_[r].offset = t_.is_product ? 0 : kept_[r].square;
      // Uses the row itself, which differs from the rounded centred row.
      if (t_.centre) kept_[r].offset = (t_.is_product ? product_of : squared_distance)(x, t_.centre, features);
    }
    for (int64_t c = 0; c < t_.packed; c += CODES) {
      const int64_t n = c + CODES < t_.packed ? CODES : t_.packed - c;
      multiply(
          scored, RowMajor{features}, count, t_.panels + c * features, features * PANEL, panels_of(n), features,
          scores_, CODES, t_.start + c, false);
      for (int64_t r = 0; r < count; ++r) {
        if (kept_[r].is_exact) continue;
        const int64_t at = is_one_chunk_ ? 0 : r * capacity_;
        collect(kept_[r], scores_ + r * CODES, n, (int32_t)c, found_ + at, places_ + at);
        if (is_one_chunk_ && !kept_[r].is_exact) finish(first + r, kept_[r], x_ + r * features, found_, places_);
      }
    }
    for (int64_t r = 0; r < count; ++r) {
      if (kept_[r].is_exact) {
        search_exactly(first + r, kept_[r], x_ + r * features);
      } else if (!is_one_chunk_) {
        finish(first + r, kept_[r], x_ + r * features, found_ + r * capacity_, places_ + r * capacity_);
      }
    }
  }

  // Products of tiny rows would be below the smallest normal number.
  void scale_up(float* x, Kept& row) const {
    row.unit = 1;
    if (!t_.is_product || t_.bias) return;
    const double square = squared_norm(x, t_.features);
    if (!(square < 0x1p-100) || square == 0) return;
    for (; row.unit * row.unit * square < 1; row.unit *= 0x1p40) {
    }
    for (int64_t d = 0; d < t_.features; ++d) x[d] = (float)((double)x[d] * row.unit);
    row.unit = 1 / row.unit;
  }

  // Adds the codes of a chunk that may be among the k best.
  void collect(Kept& row, const float* scores, int64_t n, int32_t first, float* found, int32_t* places) const {
    if (row.count == 0 && n >= wanted_) row.bound = bound_of(scores, n, wanted_, LARGEST_SCORE);
    const float limit = limit_of(row.bound, row.margin);
    row.count += keep_within<false>(scores, nullptr, first, n, limit, found + row.count, places + row.count);
    if (row.count > room_) tighten(row, found, places);
    // Too many codes tie, so all are compared in float64.
    row.is_exact = row.count > room_;
  }

  void tighten(Kept& row, float* found, int32_t* places) const {
    end_vector(found, row.count);
    const float bound = bound_of(found, row.count, wanted_, LARGEST_SCORE);
    if (bound < row.bound) row.bound = bound;
    row.count = keep_within<true>(found, places, 0, row.count, limit_of(row.bound, row.margin), found, places);
  }

  static void end_vector(float* found, int64_t n) {
    for (int64_t i = n; i % WIDTH != 0; ++i) found[i] = dlvae::NO_CODE;
  }

  void finish(int64_t row, Kept& kept, const float* x, float* found, int32_t* places) {
    if (!is_one_chunk_ && kept.count > wanted_ + wanted_ / 8 + 8) tighten(kept, found, places);
    for (int64_t i = 0; i < t_.apart; ++i) {
      const double exact = exact_score(t_, x, t_.ids[t_.packed + i]);
      const double score = (t_.is_product ? exact + kept.offset : (exact - kept.offset) / 2) * (double)t_.scale;
      const float above = score < LARGEST_SCORE ? (float)score : LARGEST_SCORE;
      found[kept.count] = above > -LARGEST_SCORE ? above : -LARGEST_SCORE;
      places[kept.count++] = (int32_t)(t_.packed + i);
    }
    const int64_t n = kept.count;
    const float* scores = sorted_;
    if (n <= SORTED_BY_RANKS) {
      sort_by_ranks(found, places, n, sorted_, sorted_places_);
    } else {
      sort_by_digits(found, places, n, sorted_, sorted_places_);
    }
    const bool needs_exact_search = n < wanted_ || scores[0] <= -LARGEST_SCORE || scores[wanted_ - 1] >= LARGEST_SCORE;
    if (needs_exact_search) return search_exactly(row, kept, x);
    int64_t* indices = t_.indices + row * t_.k;
    float* values = t_.values + row * t_.k;
    const double unit = (t_.is_product ? -kept.unit : 2.0) / (double)t_.scale;
    const double offset = kept.offset * kept.unit;
    for (int64_t i = 0; i < wanted_; ++i) values[i] = (float)((double)scores[i] * unit + offset);
    for (int64_t i = 0; i < wanted_; ++i) indices[i] = sorted_places_[i];
    if (t_.ids != nullptr)
      for (int64_t i = 0; i < wanted_; ++i) indices[i] = t_.ids[indices[i]];
    // If |x|^2 and the score cancel, the distance is computed by differences.
    if (!t_.is_product) {
      // The centre may be far from the row and the code; its rounding must not show in their distance.
      const double factor = t_.centre == nullptr ? 0x1p12 : 0x1p22;
      const double certain = factor * unit * ((double)kept.margin + (double)own_error(scores[0]));
      for (int64_t i = 0; i < wanted_ && !((double)values[i] > certain); ++i)
        values[i] = (float)squared_distance(x, t_.codes + indices[i] * t_.features, t_.features);
    }
    for (int64_t i = 0; t_.next && i < wanted_; ++i) known_[i] = __builtin_nan("");
    compare_near(kept, x, n, indices, values);
    complete(kept, x, indices, values);
  }

  // Inserts the codes that equal a code that was found, and appends codes that are not finite.
  void complete(const Kept& kept, const float* x, int64_t* indices, float* values) {
    const int64_t n = t_.next ? repeat(indices, values) : wanted_;
    for (int64_t i = n; i < t_.k; ++i) set_exactly(kept, x, t_.others[i - n], indices + i, values + i);
  }

  // Returns the new number of codes. All copies of distinct codes with the same score are sorted by index together.
  int64_t repeat(int64_t* indices, float* values) {
    for (int64_t i = 0; i < wanted_; ++i) firsts_[i] = {values[i], (int32_t)indices[i]};
    int64_t n = 0;
    for (int64_t begin = 0, end; begin < wanted_ && n < t_.k; begin = end) {
      end = begin + 1;
      while (end < wanted_ && known_[end] == known_[begin]) ++end;
      int64_t equal = 0;
      for (int64_t i = begin; i < end; ++i) {
        int64_t left = t_.k - n;
        for (int32_t code = firsts_[i].place; code >= 0 && left > 0; code = t_.next[code], --left)
          exact_[equal++] = {0, code};
      }
      if (end > begin + 1) sort_exact(exact_, merged_, equal);
      for (int64_t i = 0; i < equal && n < t_.k; ++i, ++n) {
        indices[n] = exact_[i].place;
        values[n] = (float)firsts_[begin].score;
      }
    }
    return n;
  }

  // Sorts runs of codes, in which each score is within the error bound of the next, by exact scores.
  void compare_near(const Kept& kept, const float* x, int64_t n, int64_t* indices, float* values) {
    float* scores = sorted_;
    const float last = limit_of(scores[wanted_ - 1], kept.margin);
    while (n > wanted_ && scores[n - 1] > last) --n;
    for (int64_t i = n; i < n + WIDTH + 1; ++i) scores[i] = dlvae::NO_CODE;
    const Floats margin = fill(2 * kept.margin);
    int64_t done = 0;
    for (int64_t i = 0; i < wanted_; i += WIDTH) {
      const Floats score = load<Floats>(scores + i), next = load<Floats>(scores + i + 1);
      const Floats error = margin + 4 * (float)ROUNDING * (magnitude(score) + magnitude(next));
      uint32_t bits = not_above(next - score, error);
      for (; bits != 0; bits &= bits - 1) {
        const int64_t begin = i + __builtin_ctz(bits);
        if (begin < done || begin >= wanted_) continue;
        done = compare_run(kept, x, begin, n, indices, values);
      }
    }
  }

  // Sorts the run that begins at `begin`; returns its end.
  int64_t compare_run(const Kept& kept, const float* x, int64_t begin, int64_t n, int64_t* indices, float* values) {
    const float* scores = sorted_;
    const auto is_near = [&](int64_t i) {
      return scores[i] - scores[i - 1] <= 2 * kept.margin + own_error(scores[i]) + own_error(scores[i - 1]);
    };
    int64_t end = begin;
    do {
      const int64_t code = t_.ids == nullptr ? sorted_places_[end] : t_.ids[sorted_places_[end]];
      exact_[end - begin] = {exact_score(t_, x, code), (int32_t)code};
      ++end;
    } while (end < n && is_near(end));
    sort_exact(exact_, merged_, end - begin);
    for (int64_t i = begin; i < end && i < wanted_; ++i) {
      indices[i] = exact_[i - begin].place;
      values[i] = value_of(kept, exact_[i - begin].score);
      if (t_.next) known_[i] = exact_[i - begin].score;
    }
    return end;
  }

  float value_of(const Kept& kept, double score) const { return (float)(t_.is_product ? -score * kept.unit : score); }

  // Computes all scores in float64; a heap keeps the best codes, the worst of them on top.
  void search_exactly(int64_t row, const Kept& kept, const float* x) {
    int64_t* indices = t_.indices + row * t_.k;
    float* values = t_.values + row * t_.k;
    const double square = squared_norm(x, t_.features);
    if (square != square) {
      for (int64_t i = 0; i < t_.k; ++i) indices[i] = i, values[i] = __builtin_nanf("");
      return;
    }
    if (square - square != 0) return search_by_index(kept, x, indices, values);
    float least = __builtin_inff();
    for (int64_t d = 0; d < t_.features; ++d) least = __builtin_fabsf(x[d]) < least ? __builtin_fabsf(x[d]) : least;
    // The features of the row are so large that float64 differences do not depend on the code. Codes are in ascending
    // order unless some are apart.
    const bool vanish = !t_.is_product && !t_.centre && (double)least > 0x1p54 * t_.peak;
    const bool are_equal = vanish && t_.apart == 0;
    int64_t n = 0;
    double score = 0;
    for (int64_t i = 0; i < t_.packed + t_.apart && !(are_equal && n == wanted_); ++i) {
      const int32_t code = t_.ids == nullptr ? (int32_t)i : t_.ids[i];
      if (i == 0 || !are_equal) score = exact_score(t_, x, code);
      n = add_to_heap(exact_, n, wanted_, {score, code});
    }
    sort_exact(exact_, merged_, wanted_);
    for (int64_t i = 0; i < wanted_; ++i) {
      indices[i] = exact_[i].place;
      values[i] = value_of(kept, exact_[i].score);
      if (t_.next) known_[i] = exact_[i].score;
    }
    complete(kept, x, indices, values);
  }

  // If a row holds an infinity no score is finite: codes are sorted by index, those that hold NaN last.
  void search_by_index(const Kept& kept, const float* x, int64_t* indices, float* values) const {
    const int32_t* nans = t_.others + t_.infinite;
    int64_t n = 0, passed = 0;
    for (int32_t code = 0; code < t_.count && n < t_.k; ++code) {
      if (passed < t_.nans && nans[passed] == code) {
        ++passed;
      } else {
        set_exactly(kept, x, code, indices + n, values + n), ++n;
      }
    }
    for (int64_t i = 0; n < t_.k; ++i, ++n) set_exactly(kept, x, nans[i], indices + n, values + n);
  }

  void set_exactly(const Kept& kept, const float* x, int32_t code, int64_t* index, float* value) const {
    *index = code;
    *value = value_of(kept, exact_score(t_, x, code));
  }

  const Topk& t_;
  const int64_t wanted_;    // number of distinct finite codes to find
  const int64_t room_;      // number of candidates that a row carries to the next chunk
  const int64_t capacity_;  // `room_` plus a whole chunk and padding to vectors
  const bool is_one_chunk_;
  const int64_t block_;
  Buffer<float> x_;        // [block, D]
  Buffer<float> centred_;  // x_ minus the centre
  Buffer<float> scores_;   // [block, CODES]
  Buffer<Kept> kept_;
  Buffer<float> found_;  // [block or 1, capacity]
  Buffer<int32_t> places_;
  Buffer<float> sorted_;
  Buffer<int32_t> sorted_places_;
  const double centre_norm_;
  Buffer<Exact> exact_, merged_;  // [K]
  // If codes are repeated: the float64 scores of the codes that were found, or NaN for a score that is certain without
  // float64 and then equals no other; and these codes with their values.
  Buffer<double> known_;  // [wanted]
  Buffer<Exact> firsts_;  // [wanted]
};

inline void topk_rows(const Topk& t, int64_t begin, int64_t end) { TopkSearch(t).run(begin, end); }

}  // namespace
