// The backward pass of residual quantization, in plain numbers.
#pragma once

#include <stdint.h>

#include "../rows.h"

namespace dlvae {

// How the gradient of the quantized rows passes to x; see residual_quantize.
enum class ResidualGradient : int { once, each, rotation, rotation_each };

struct ResidualBackward {
  const float* codebooks;  // [L, K, D]
  int64_t levels, codes;
  const int64_t* indices;  // [N, L]; negative where a row has no code
  const float* weights;    // [L]: the gradient of a row is this times the residual that a level leaves
  ResidualGradient gradient;
  Rows x, grad, grad_x;
};

}  // namespace dlvae
