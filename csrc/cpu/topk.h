// The arguments of the search of the k best codes: codes measured and packed once per call.
#pragma once

#include <stdint.h>

#include "../rows.h"

namespace dlvae {

// A float64 score, lower is better, and its code.
struct Exact {
  double score;
  int32_t place;
};

struct Topk {
  Rows x;
  const float* codes;  // [K, D]
  const float* bias;   // [K], or null
  int64_t count;       // K
  int64_t features;    // D
  int64_t k;
  bool is_product;

  // Scores are computed for codes and, with 'l2', rows minus `centre`; see centre_of. Null if they are not centred.
  const float* centre;   // [D]
  const float* centred;  // [K, D]: fl(c - centre), or the codes themselves

  // Finite codes with a finite bias that differ from all earlier codes are packed, except the last `apart`, which are
  // far longer than the others and are compared in float64. Codes that are not finite rank after all others.
  int64_t packed, apart;
  const int32_t* ids;     // [packed + apart]; null if all codes are packed
  const int32_t* next;    // [K]: the next code that equals this one, or -1; null if no two codes are equal
  const int32_t* others;  // the codes that are not finite: first those without NaN
  int64_t infinite;       // how many of them hold no NaN
  int64_t nans;           // how many of them hold NaN
  // A score is start - x.c with the packed c. Divided by `scale` it is |c|^2 / 2 - x.c, or -(x.c + b).
  const float* panels;  // [panels, D, PANEL]: codes times -scale
  const float* start;   // [panels, PANEL]: above all scores for padding
  float scale;          // a power of two that scales the longest code to a length of about 1
  double norm;          // length of the longest packed code, scaled
  double peak;          // the largest feature of all finite codes before centring

  int64_t* indices;  // [N, k]
  float* values;     // [N, k]
};

// The start of a score has at most this magnitude. Rows whose scores come near it are computed in float64.
constexpr float LARGEST_START = 0x1p110f;
// The score of padding, above all scores of codes.
constexpr float NO_CODE = 3e38f;

}  // namespace dlvae
