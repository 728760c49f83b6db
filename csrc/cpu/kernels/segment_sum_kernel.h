// Sums of rows by code.
#pragma once

#include "../segments.h"
#include "weighted_sum.h"

namespace {

using dlvae::Segments;
using dlvae::Share;

inline void sum_segments(
    const Segments& segments, const Share& share, int64_t begin, int64_t end, const float* data, int64_t data_ld,
    bool is_far, int64_t* places, double* totals, float* sums, int64_t features, int64_t ld) {
  const bool are_codes_few = segments.codes <= segments.starts[segments.codes] / SUM_CHAIN;
  const uint32_t* last = segments.rows + segments.starts[segments.codes];
  const int64_t codes_end = share.last_code + (share.last_feature > 0);
  for (int64_t code = share.first_code; code < codes_end; ++code) {
    const int64_t from = code == share.first_code ? share.first_feature : 0;
    const int64_t to = code == share.last_code ? share.last_feature : features;
    float* sum = sums + code * ld;
    const int64_t start = segments.starts[code], stop = segments.starts[code + 1];
    int64_t& place = places[code - share.first_code];
    if (begin == 0) {
      place = start;
      if (start == stop) memset(sum + from, 0, (to - from) * sizeof(float));
    }
    if (place == stop) continue;
    // The rows of a code are in ascending order.
    int64_t next = place;
    if (segments.rows[stop - 1] < end) {
      next = stop;
    } else {
      while (segments.rows[next] < end) ++next;
    }
    if (next == place) continue;
    const float* weights = segments.weights == nullptr ? nullptr : segments.weights + place;
    // Each branch constructs its own terms, so that the first branch keeps them in registers.
    const auto terms = [&] {
      return Terms<uint32_t>{
          segments.rows + place, last, weights, segments.weight, next - place, data, begin, end, data_ld, is_far};
    };
    if (stop - start <= SUM_CHAIN) {
      add_chain(terms(), from, to, place == start, sum);
    } else {
      double* total = totals + (are_codes_few ? code : start / SUM_CHAIN) * features;
      add_chains(terms(), place - start, stop - start, from, to, total, sum);
    }
    place = next;
  }
}

}  // namespace
