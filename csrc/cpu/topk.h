// What the search of the k best codes takes: the codes measured and packed once a call.
#pragma once

#include <stdint.h>

#include "../rows.h"

namespace dlvae {

// A score in float64, the lower the better, and its code.
struct Exact {
  double score;
  int32_t place;
};

struct Topk {
  Rows x;
  const float* codes;  // [K, D]
  const float* bias;   // [K] or null
  int64_t count;       // K
  int64_t features;    // D
  int64_t k;
  bool is_product;

  // Scores are found of codes and, with 'l2', rows less `centre`, see centre_of; null where they have none.
  const float* centre;   // [D]
  const float* centred;  // [K, D]: fl(c - centre), or the codes themselves

  // Codes that are finite, with a finite bias, and differ from those before are packed, but for a few that are far
  // longer than the others: these are compared in float64. Codes that are not finite follow all others.
  int64_t packed, apart;
  const int32_t* ids;     // [packed + apart], or null where all codes are packed
  const int32_t* next;    // [K]: the next code that is equal to this one, or -1; null where no code is
  const int32_t* others;  // codes that are not finite: first those that hold no NaN
  int64_t infinite;       // how many these are
  int64_t nans;           // how many hold NaN
  // A score is start - x.c for the packed c; times 1 / scale it is |c|^2 / 2 - x.c, or -(x.c + b).
  const float* panels;  // [panels, D, PANEL]: codes times -scale
  const float* start;   // [panels, PANEL]: beyond all scores where there is no code
  float scale;          // a power of two that takes the longest code to about 1
  double norm;          // of the longest packed code, scaled
  double peak;          // the largest feature of all finite codes, of which the centre is not taken off

  int64_t* indices;  // [N, k]
  float* values;     // [N, k]
};

// The start of a score lies within this; rows whose scores come near are computed in float64.
constexpr float LARGEST_START = 0x1p110f;
constexpr float NO_CODE = 3e38f;

}  // namespace dlvae
