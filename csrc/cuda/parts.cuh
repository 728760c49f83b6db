// Scales of packed rows and codes, and the error bounds of their products.
#pragma once

#include "device.cuh"
#include "parts.h"

namespace dlvae {

// Scaling takes the largest element into [2^TOP, 2^(TOP + 1)).
constexpr int TOP = 13;

// Returns the exponent of the power of two that scales `largest` to TOP.
inline __device__ int exponent_for(float largest) { return largest == 0 ? 0 : TOP - ilogbf(largest); }

// Returns u, for which the unscaled product of x and a code is the scaled product * u * u. The square of u might
// overflow float32.
inline __device__ float unit_of(const float* extent, bool is_split) {
  return is_split ? ldexpf(1, -exponent_for(extent[0])) : 1;
}

// The error bound of a sum of products as a fraction of |x| |c|; docs/numerics.md, 6.1. The terms omit 2^-20. Tensor
// cores add 16 features of one product of terms with an error of at most 20 units of 2^-24 of the largest addend, which
// is at most |x| |c| (Fasi et al. 2021, doi:10.7717/peerj-cs.330).
template <int PRODUCTS_OF_TERMS>
inline __device__ float error_of_products(int64_t features) {
  return 0x1p-20f * (1 + (float)features * (PRODUCTS_OF_TERMS * 20 / 256.0f));
}
// The error bound of a score as a fraction of the half norm or bias that the product is subtracted from.
constexpr float ERROR_OF_START = 0x1p-22f;
// The error bound of underflow in products of half-precision numbers.
inline __device__ float error_of_underflow(int64_t features) { return 0x1p-125f * (float)features; }

// Atomically raises *most to at least `value`. Numbers that are not negative have the same order as their bits.
inline __device__ void raise(float* most, float value) {
  atomicMax(reinterpret_cast<int*>(most), __float_as_int(value));
}

}  // namespace dlvae
