// The arguments of the code entropy and its gradients.
#pragma once

#include "softmax.h"

namespace dlvae {

// The softmax of the logits (2 x.c - |c|^2) / temperature over all codes; k is 0.
struct CodeEntropy {
  KeptSoftmax softmax;
  const bool* valid;  // [N]; null if all rows are valid
  float* entropies;   // [N]; 0 for a row that is not valid, whose sums are 0 and infinity
};

struct CodeEntropyBackward {
  KeptSoftmaxBackward softmax;
  CodeEntropy forward;          // with results
  const float* grad_entropies;  // [N]
  const float* slopes;          // [panels of K, PANEL]: the gradient of each probability by the means
};

}  // namespace dlvae
