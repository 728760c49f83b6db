// What the search of the k best codes takes: the codes measured and packed once a call.
#pragma once

#include <stdint.h>

#include "../rows.h"

namespace dlvae {

struct Topk {
  Rows x;
  const float* codes;  // [K, D]
  const float* bias;   // [K] or null
  int64_t count;       // K
  int64_t features;    // D
  int64_t k;
  bool is_product;

  // Codes that are finite, with a finite bias, are packed; the others follow them, in this order.
  int64_t packed;
  const int32_t* ids;     // [packed], or null where that is all of them
  const int32_t* others;  // [K - packed]: first those that hold no NaN
  int64_t infinite;       // how many these are
  // A score is start - x.c for the packed c; times 1 / scale it is |c|^2 / 2 - x.c, or -(x.c + b).
  const float* panels;  // [panels, D, PANEL]: codes times -scale
  const float* start;   // [panels, PANEL]: beyond all scores where there is no code
  float scale;          // a power of two that takes the longest code to about 1
  double norm;          // of the longest packed code, scaled

  int64_t* indices;  // [N, k]
  float* values;     // [N, k]
};

// The start of a score lies within this; rows whose scores come near are computed in float64.
constexpr float LARGEST_START = 0x1p110f;
constexpr float NO_CODE = 3e38f;

}  // namespace dlvae
