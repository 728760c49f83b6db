// Selection of a few of many scores, and sorting by (score, place).
#pragma once

#include "buffer.h"
#include "compare.h"

namespace {

// Returns a bound that at least k of n scores do not exceed, and few more than k; or `limit` if fewer than k scores are
// that low. The scores are padded with NO_CODE to a whole vector.
inline float bound_of(const float* scores, int64_t n, int64_t k, float limit) {
  Floats low[2] = {fill(dlvae::NO_CODE), fill(dlvae::NO_CODE)}, high = fill(-limit);
  for (int64_t i = 0; i < n; i += WIDTH) {
    const Floats score = load<Floats>(scores + i);
    low[1] = smaller(low[1], score);
    high = larger(high, score <= limit ? score : fill(-limit));
    const Floats swap = low[0];
    low[0] = low[1], low[1] = swap;
  }
  const float least = lowest(smaller(low[0], low[1]));
  float most = highest(larger(low[0], low[1]));
  // Each lane has a lowest score; at least PANEL scores do not exceed the largest of these.
  if (k > PANEL || most > limit) most = highest(high);
  // Invariant: fewer than k scores are at most `below`, at least k are at most `above`.
  int32_t below = ordered(least) - 1, above = ordered(most);
  int64_t count_below = 0, count_above = count_within(scores, n, most);
  if (count_above < k) return limit;
  const int64_t enough = k + k / 8 + 12;
  for (int step = 0; count_above > enough && above - (int64_t)below > 1; ++step) {
    // Interpolates as if the scores were uniformly distributed; every third step bisects, which limits the number of
    // steps.
    const float from = from_ordered(below), to = from_ordered(above);
    const float share = ((float)(k - count_below) + (float)(enough - k) / 2) / (float)(count_above - count_below);
    int32_t middle = ordered(from + (to - from) * share);
    if (step % 3 == 2 || middle <= below || middle >= above) middle = (int32_t)(((int64_t)below + above) >> 1);
    const int64_t count = count_within(scores, n, from_ordered(middle));
    if (count < k) {
      below = middle, count_below = count;
    } else {
      above = middle, count_above = count;
    }
  }
  return from_ordered(above);
}

// Sorts n scores by counting for each how many come before it. Any values may pad the scores to a block of 4 vectors.
// Places ascend.
inline void sort_by_ranks(
    const float* scores, const int32_t* places, int64_t n, float* sorted, int32_t* sorted_places) {
  constexpr int64_t GROUP_SIZE = 4 * WIDTH;
  int32_t ranks[GROUP_SIZE];
  for (int64_t i = 0; i < n; i += GROUP_SIZE) {
    Floats own[4];
    Ints counts[4];
    unroll<4>([&](auto v) {
      own[decltype(v)::value] = load<Floats>(scores + i + decltype(v)::value * WIDTH);
      counts[decltype(v)::value] = Ints{};
    });
    // Ties: the scores at lower positions come first.
    for (int64_t j = 0; j < i; ++j) {
      const Floats other = fill(scores[j]);
      unroll<4>([&](auto v) {
        counts[decltype(v)::value] = count_not_above(counts[decltype(v)::value], other, own[decltype(v)::value]);
      });
    }
    const int64_t end = i + GROUP_SIZE < n ? i + GROUP_SIZE : n;
    unroll<4>([&](auto u) {
      constexpr int t = decltype(u)::value;
      for (int lane = 0; lane < WIDTH && i + t * WIDTH + lane < end; ++lane) {
        const Floats other = fill(scores[i + t * WIDTH + lane]);
        unroll<4>([&](auto v) {
          constexpr int w = decltype(v)::value;
          if constexpr (w < t) counts[w] = count_below(counts[w], other, own[w]);
          if constexpr (w == t) counts[w] = count_before(counts[w], other, own[w], lane);
          if constexpr (w > t) counts[w] = count_not_above(counts[w], other, own[w]);
        });
      }
    });
    for (int64_t j = end; j < n; ++j) {
      const Floats other = fill(scores[j]);
      unroll<4>([&](auto v) {
        counts[decltype(v)::value] = count_below(counts[decltype(v)::value], other, own[decltype(v)::value]);
      });
    }
    unroll<4>([&](auto v) { store(ranks + decltype(v)::value * WIDTH, counts[decltype(v)::value]); });
    for (int64_t j = i; j < end; ++j) {
      sorted[ranks[j - i]] = scores[j];
      sorted_places[ranks[j - i]] = places[j];
    }
  }
}

// Radix sort of the same data, for many scores. The input is overwritten.
inline void sort_by_digits(float* scores, int32_t* places, int64_t n, float* sorted, int32_t* sorted_places) {
  constexpr int DIGIT = 8;
  for (int shift = 0; shift < 32; shift += DIGIT) {
    int64_t starts[1 << DIGIT] = {};
    const auto digit = [&](float score) {
      return ((uint32_t)ordered(score) ^ 0x80000000u) >> shift & ((1 << DIGIT) - 1);
    };
    for (int64_t i = 0; i < n; ++i) ++starts[digit(scores[i])];
    int64_t start = 0;
    for (int64_t& each : starts) {
      const int64_t count = each;
      each = start;
      start += count;
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t to = starts[digit(scores[i])]++;
      sorted[to] = scores[i];
      sorted_places[to] = places[i];
    }
    memcpy(scores, sorted, n * sizeof(float));
    memcpy(places, sorted_places, n * sizeof(int32_t));
  }
}

using dlvae::Exact;

DLVAE_INLINE bool comes_before(const Exact& a, const Exact& b) {
  return a.score < b.score || (a.score == b.score && a.place < b.place);
}

// Moves the element at `top` of a heap down until no element below it comes after it.
inline void sink(Exact* heap, int64_t n, int64_t top) {
  for (int64_t child = 2 * top + 1; child < n; child = 2 * top + 1) {
    if (child + 1 < n && comes_before(heap[child], heap[child + 1])) ++child;
    if (!comes_before(heap[top], heap[child])) return;
    const Exact swap = heap[top];
    heap[top] = heap[child], heap[child] = swap;
    top = child;
  }
}

// Adds an element to a heap that keeps the best `most` elements, the worst of them on top. Returns the new size.
DLVAE_INLINE int64_t add_to_heap(Exact* heap, int64_t n, int64_t most, Exact added) {
  if (n < most) {
    heap[n++] = added;
    for (int64_t top = n == most ? most / 2 - 1 : -1; top >= 0; --top) sink(heap, most, top);
  } else if (comes_before(added, heap[0])) {
    heap[0] = added;
    sink(heap, most, 0);
  }
  return n;
}

// Merge sort of n elements by (score, place), between `all` and `other`, which hold n each.
inline void sort_exact(Exact* all, Exact* other, int64_t n) {
  Exact *from = all, *to = other;
  for (int64_t length = 1; length < n; length *= 2) {
    for (int64_t begin = 0; begin < n; begin += 2 * length) {
      const int64_t middle = begin + length < n ? begin + length : n;
      const int64_t end = middle + length < n ? middle + length : n;
      int64_t a = begin, b = middle;
      for (int64_t i = begin; i < end; ++i)
        to[i] = b >= end || (a < middle && !comes_before(from[b], from[a])) ? from[a++] : from[b++];
    }
    Exact* swap = from;
    from = to, to = swap;
  }
  if (from != all) memcpy(all, from, n * sizeof(Exact));
}

}  // namespace
