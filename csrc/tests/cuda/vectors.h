// CUDA's qualifiers and vector types.
#pragma once

#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
// All __shared__ variables are in one section, so that each block starts with poison in all of them. The address
// sanitizer would not check that section, so they are plain variables there.
#if defined(__SANITIZE_ADDRESS__)
#define __shared__ static
#else
#define __shared__ static __attribute__((section("dlvae_shared")))
#endif
#define __constant__ static
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)

using cudaStream_t = void*;

#define DLVAE_VECTORS(T, name, size) \
  struct alignas(size) name##1 { T x; }; \
  struct alignas(2 * size) name##2 { T x, y; }; \
  struct name##3 { T x, y, z; }; \
  struct alignas(4 * size < 16 ? 4 * size : 16) name##4 { T x, y, z, w; }; \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
DLVAE_VECTORS(unsigned char, uchar, 1)
DLVAE_VECTORS(short, short, 2)
DLVAE_VECTORS(unsigned short, ushort, 2)
DLVAE_VECTORS(int, int, 4)
DLVAE_VECTORS(unsigned, uint, 4)
DLVAE_VECTORS(float, float, 4)
DLVAE_VECTORS(long long, longlong, 8)
DLVAE_VECTORS(unsigned long long, ulonglong, 8)
DLVAE_VECTORS(double, double, 8)
#undef DLVAE_VECTORS

struct dim3 {
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned x, y, z;
};
