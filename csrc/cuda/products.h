// Products of the rows of two matrices on tensor cores, to the precision of float32.
#pragma once

#include "parts.h"

namespace dlvae {

// out[i * ld + j] = start[j] + sign * x[i] . codes[j], in float32.
struct Affine {
  const float* start;  // [count of packed codes]; null for zeros
  float sign;
  bool is_scaled;  // products in the scale of the packed codes
  bool adds;       // adds to the previous value instead of `start`
};

// Computes rows [begin, end) of x times all codes; returns the packed rows. Rows and codes that the terms cannot hold,
// such as those with infinite elements, contribute nothing.
PackedRows products(
    const Tensor& like, const Rows& x, int64_t begin, int64_t end, const PackedCodes& packed, const Affine& affine,
    float* out, int64_t ld, const Device& device);
// Adds the products that `products` omits, computed from the elements themselves.
void repair_products(
    const Rows& x, int64_t begin, const PackedRows& rows, const Rows& codes, const PackedCodes& packed,
    const Affine& affine, float* out, int64_t ld, const Device& device);

}  // namespace dlvae
