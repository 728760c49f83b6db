// Building blocks of kernels. Blocks have one dimension and consist of whole warps.
#pragma once

#include "../rows.h"
#if defined(DLVAE_EMULATE_CUDA)
#include "../tests/cuda/emulator.h"
#else
#include "ptx.cuh"
#endif

namespace dlvae {

constexpr int WARP = 32;
constexpr uint32_t ALL_LANES = 0xffffffff;

inline __device__ int lane_index() { return static_cast<int>(threadIdx.x) % WARP; }
inline __device__ int warp_index() { return static_cast<int>(threadIdx.x) / WARP; }
inline __device__ int warps_in_block() { return static_cast<int>(blockDim.x) / WARP; }

inline __device__ float to_float(float value) { return value; }
inline __device__ float to_float(__half value) { return __half2float(value); }
inline __device__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

inline __device__ void from_float(float value, float* to) { *to = value; }
inline __device__ void from_float(float value, __half* to) { *to = __float2half_rn(value); }
inline __device__ void from_float(float value, __nv_bfloat16* to) { *to = __float2bfloat16_rn(value); }

// COUNT elements that one load or store moves: at most 16 bytes, aligned to their size.
template <class T, int COUNT>
struct alignas(sizeof(T) * COUNT) Vector {
  static_assert(sizeof(T) * COUNT <= 16);
  T values[COUNT];
};

template <class T, int COUNT>
constexpr int VECTOR = COUNT * sizeof(T) <= 16 ? COUNT : static_cast<int>(16 / sizeof(T));

// Reads COUNT elements of type T as float32, by loads of at most 16 bytes.
template <int COUNT, class T>
__device__ void load_floats(const T* from, float (&to)[COUNT]) {
  constexpr int STEP = VECTOR<T, COUNT>;
  static_assert(COUNT % STEP == 0);
#pragma unroll
  for (int i = 0; i < COUNT; i += STEP) {
    const Vector<T, STEP> vector = *reinterpret_cast<const Vector<T, STEP>*>(from + i);
#pragma unroll
    for (int j = 0; j < STEP; ++j) to[i + j] = to_float(vector.values[j]);
  }
}

template <int COUNT, class T>
__device__ void store_floats(const float (&from)[COUNT], T* to) {
  constexpr int STEP = VECTOR<T, COUNT>;
  static_assert(COUNT % STEP == 0);
#pragma unroll
  for (int i = 0; i < COUNT; i += STEP) {
    Vector<T, STEP> vector;
#pragma unroll
    for (int j = 0; j < STEP; ++j) from_float(from[i + j], &vector.values[j]);
    *reinterpret_cast<Vector<T, STEP>*>(to + i) = vector;
  }
}

struct Sum {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Least {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};
struct Greatest {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};

// Reduces over WIDTH adjacent lanes, a power of two, with butterfly shuffles; all lanes get the result. T: a type that
// shuffles support.
template <int WIDTH = WARP, class T, class Op>
__device__ T warp_reduce(T value, const Op& op) {
#pragma unroll
  for (int step = WIDTH / 2; step > 0; step /= 2) value = op(value, __shfl_xor_sync(ALL_LANES, value, step));
  return value;
}

// Reduces over all threads of a block, in the order of the warps; all threads get the result. scratch: shared memory,
// one element per warp.
template <class T, class Op>
__device__ T block_reduce(T value, const Op& op, T* scratch) {
  value = warp_reduce(value, op);
  if (lane_index() == 0) scratch[warp_index()] = value;
  __syncthreads();
  value = scratch[0];
  for (int warp = 1; warp < warps_in_block(); ++warp) value = op(value, scratch[warp]);
  // All threads have read `scratch` before it is reused.
  __syncthreads();
  return value;
}

// Returns how many lanes of a ballot are below this lane.
inline __device__ int rank_in(uint32_t ballot) { return __popc(ballot & ((1u << lane_index()) - 1)); }

// Returns the number of a code among the H * K codes of all heads, from the index of a vector of head vector % H.
inline __device__ int64_t flat_code(int64_t vector, int64_t index, int64_t heads, int64_t num_codes) {
  return heads == 1 ? index : vector % heads * num_codes + index;
}

// Returns the offset of a row from the first row, in elements.
inline __host__ __device__ int64_t row_offset(const Rows& rows, int64_t row) {
  int64_t offset = 0;
  for (int dim = rows.dims - 1; dim > 0; --dim) {
    const int64_t above = row / rows.sizes[dim];
    offset += (row - above * rows.sizes[dim]) * rows.strides[dim];
    row = above;
  }
  return offset + row * rows.strides[0];
}

}  // namespace dlvae
