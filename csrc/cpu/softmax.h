// The arguments of the kept softmax and its gradients.
#pragma once

#include <stdint.h>

#include "../rows.h"

namespace dlvae {

struct KeptSoftmax {
  Rows x;
  int64_t codes;     // K
  int64_t features;  // D
  int64_t k;
  const float* panels;     // [panels of K, D, PANEL]: the weight
  const float* start;      // [panels of K, PANEL]: the bias; minus infinity for padding
  const int64_t* indices;  // [N, k]
  float* values;           // [N, k]
  float* sums;             // [N, 2]: the largest logit m, and the sum of exp(logit - m)
};

// The backward pass processes superblocks of rows. For each superblock it computes the gradient G of the logits and the
// gradient of x, block by block of rows, and then adds the contribution of G to the gradient of the weight.
struct KeptSoftmaxBackward {
  KeptSoftmax forward;
  const float* grad;     // [N, k]
  const float* columns;  // [panels of D, K, PANEL]: the weight again, if x needs a gradient
  bool needs_weight, needs_bias;
  Rows grad_x;  // without data if x needs no gradient

  int64_t room;   // rows of a superblock, plus padding that keeps its tiles apart in the caches
  float* logits;  // [tiles of K, room, ROWS]: G
  float* rows;    // [panels of D, room, PANEL]: x
  float* weight;  // [panels of D, tiles of K, ROWS, PANEL]: the gradient of the weight so far
  double* bias;   // [tiles of K, ROWS]: the gradient of the bias so far
};

}  // namespace dlvae
