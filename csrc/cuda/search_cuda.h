// The nearest code of each row, for nearest_code and vector_quantize.
#pragma once

#include "launch.h"

namespace dlvae {

// Writes the indices [N] of the nearest codes, exactly those of float64 differences; ties go to the lowest index.
//
// Products on tensor cores give the best and the second-best score of each row. If rounding might have changed the
// order of the two, the row is put on a list, and all its distances are computed by differences. The list has room for
// all rows. Returns the number of rows on the list as an int32 tensor [1].
//
// With heads, x is ordered by head (`rows_by_head`), codes are those of all heads, and the indices [N / heads, heads]
// are in the order of the tensor.
Tensor search(
    const Tensor& like, const Rows& x, const Rows& codes, int64_t* indices, const Device& device, int64_t heads = 1);

}  // namespace dlvae
