// Products of the rows of two matrices on tensor cores, to the precision of float32.
#pragma once

#include "parts.h"

namespace dlvae {

// out[i * ld + j] = start[j] + sign * x[i] . codes[j], in float32.
struct Affine {
  const float* start;  // [count of packed codes], or null for zeros
  float sign;
  bool is_scaled;  // products of x and the codes as they were scaled when packed
  bool adds;       // to what is there, in place of start
};

// Rows [begin, end) of x and all codes; returns the packed rows. Of rows and codes that the parts do not hold, those
// with infinite elements say, nothing is added.
PackedRows products(
    const Tensor& like, const Rows& x, int64_t begin, int64_t end, const PackedCodes& packed, const Affine& affine,
    float* out, int64_t ld, const Device& device);
// Adds what was left out, from the elements themselves.
void repair_products(
    const Rows& x, int64_t begin, const PackedRows& rows, const Rows& codes, const PackedCodes& packed,
    const Affine& affine, float* out, int64_t ld, const Device& device);

}  // namespace dlvae
