// PTX instructions that CUDA C++ does not expose, for sm_80 and newer.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include <type_traits>

namespace dlvae {

inline __device__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Starts an asynchronous copy of 16 bytes from global to shared memory, both aligned to 16 bytes. Bytes from `bytes` on
// become zeros.
inline __device__ void cp_async16(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes)
               : "memory");
}

// Groups the copies that this thread has started since the last commit.
inline __device__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all groups of this thread but the last PENDING. Other threads see the data after a barrier.
template <int PENDING>
__device__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Lane i gives the address of row i % 8, of 16 bytes, of matrix i / 8. It receives elements 2 * (i % 4) and the next
// one of row i / 4 of each matrix.
inline __device__ void ldmatrix_x4(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// Lanes 0 to 15 give the addresses of the rows.
inline __device__ void ldmatrix_x2(uint32_t (&to)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(to[0]), "=r"(to[1])
               : "r"(shared_address(row))
               : "memory");
}

// The same as ldmatrix_x4, but each lane receives elements of columns instead of rows.
inline __device__ void ldmatrix_x4_trans(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// sums [16, 8] += a [16, 16] @ b [16, 8], T: __half or __nv_bfloat16, two in a register; with group = lane / 4 and
// pair = lane % 4 * 2 a lane holds
//   of a: (group, pair), (group + 8, pair), (group, pair + 8), (group + 8, pair + 8), and the next column of each;
//   of b: (pair, group), (pair + 8, group), and the next row of each;
//   of sums: (group, pair), (group, pair + 1), (group + 8, pair), (group + 8, pair + 1).
// So ldmatrix_x4 gives a from rows of a, and ldmatrix_x2 gives b from rows of its transpose.
template <class T>
__device__ void mma_m16n8k16(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// Dynamic shared memory, whose size the launch sets.
template <class T>
__device__ T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char dlvae_dynamic_shared[];
  return reinterpret_cast<T*>(dlvae_dynamic_shared);
}

}  // namespace dlvae
