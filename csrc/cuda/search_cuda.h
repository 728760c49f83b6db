// The nearest code of each row: what nearest_code and vector_quantize share.
#pragma once

#include "launch.h"

namespace dlvae {

// Indices [N] of the nearest codes, exactly as differences in float64 give them, the lowest of equal ones.
//
// Products on tensor cores find the best and the second best score of each row. Where rounding might hide which of them
// is the better, the row goes on a list, and all its distances are computed by differences. The list has room for all
// rows. Returns how many rows are on the list. [1] int32
Tensor search(const Tensor& like, const Rows& x, const Rows& codes, int64_t* indices, const Device& device);

}  // namespace dlvae
