// What kernels read from packed rows and codes, and how far their products may be from the true ones.
#pragma once

#include "device.cuh"
#include "parts.h"

namespace dlvae {

// The largest element of what is scaled lies in [2^TOP, 2^(TOP + 1)).
constexpr int TOP = 13;

// The power of two that brings numbers with that largest one to TOP.
inline __device__ int exponent_for(float largest) { return largest == 0 ? 0 : TOP - ilogbf(largest); }

// A product of scaled x and codes, times this twice, is that of x and the codes; twice, as the square may be no
// float32.
inline __device__ float unit_of(const float* extent, bool is_split) {
  return is_split ? ldexpf(1, -exponent_for(extent[0])) : 1;
}

// How far a product may be off, as a share of |x| |c|: the parts leave out 2^-20, and each of D / 16 additions on
// tensor cores, for each of 4 terms, cuts each of 16 addends at 2^-24 of the largest (Fasi et al. 2021,
// doi:10.7717/peerj-cs.330), which is at most |x| |c|.
inline __device__ float error_of_products(int64_t features) { return 0x1p-20f * (1 + (float)features / 4); }
// And a score, as a share of the half norms or biases that it is taken from.
constexpr float ERROR_OF_START = 0x1p-22f;
// And what underflows, which products of half-precision numbers may.
inline __device__ float error_of_underflow(int64_t features) { return 0x1p-125f * (float)features; }

// To the larger of the two; of numbers that are not negative the order is that of their bits.
inline __device__ void raise(float* most, float value) {
  atomicMax(reinterpret_cast<int*>(most), __float_as_int(value));
}

}  // namespace dlvae
