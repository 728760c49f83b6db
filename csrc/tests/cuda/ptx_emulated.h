// The instructions of csrc/cuda/ptx.cuh, with the fragment layouts of NVIDIA's PTX ISA, section 9.7.14.5.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#include "block.h"
#include "half.h"

namespace dlvae::emulator {

inline void check_aligned(const char* name, const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) fail(std::string(name) + ": not a multiple of 16 bytes");
}

struct Matrices {
  const void* row;
  uint32_t to[4];
};

// Lane i gives the address of row i % 8 of matrix i / 8, and receives elements 2 * (i % 4) and the next one of row i /
// 4 of each matrix or, transposed, of column i / 4.
template <int COUNT, bool IS_TRANSPOSED>
void load_matrices(void* const* lanes, uint32_t present) {
  if (present != 0xffffffff) fail("ldmatrix: not all lanes are there");
  uint16_t rows[8 * COUNT][8];
  for (int i = 0; i < 8 * COUNT; ++i) {
    const void* row = static_cast<Matrices*>(lanes[i])->row;
    check_aligned("ldmatrix", row);
    std::memcpy(rows[i], row, 16);
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int matrix = 0; matrix < COUNT; ++matrix) {
      const uint16_t (*of)[8] = rows + 8 * matrix;
      const int group = lane / 4, pair = lane % 4 * 2;
      const uint32_t low = IS_TRANSPOSED ? of[pair][group] : of[group][pair];
      const uint32_t high = IS_TRANSPOSED ? of[pair + 1][group] : of[group][pair + 1];
      static_cast<Matrices*>(lanes[lane])->to[matrix] = high << 16 | low;
    }
  }
}

template <int COUNT, bool IS_TRANSPOSED>
void ldmatrix(const char* name, uint32_t (&to)[COUNT], const void* row) {
  Matrices mine{row, {}};
  wait_for_lanes(name, 0xffffffff, load_matrices<COUNT, IS_TRANSPOSED>, &mine);
  for (int i = 0; i < COUNT; ++i) to[i] = mine.to[i];
}

struct Product {
  float* sums;
  const uint32_t *a, *b;
};

inline float as_float(__half value) { return __half2float(value); }
inline float as_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// Returns element i of a fragment, whose registers hold two elements each.
template <class T>
float element(const uint32_t* fragment, int i) {
  return as_float(T{static_cast<uint16_t>(fragment[i / 2] >> (i % 2 * 16))});
}

template <class T>
void multiply(void* const* lanes, uint32_t present) {
  if (present != 0xffffffff) fail("mma: not all lanes are there");
  float a[16][16], b[16][8];  // [M, K], [K, N]
  for (int lane = 0; lane < 32; ++lane) {
    const Product& one = *static_cast<Product*>(lanes[lane]);
    const int group = lane >> 2, pair = lane % 4 * 2;
    for (int i = 0; i < 8; ++i) {
      const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
      a[row][pair + (i & 1) + (i < 4 ? 0 : 8)] = element<T>(one.a, i);
    }
    for (int i = 0; i < 4; ++i) b[pair + (i & 1) + (i < 2 ? 0 : 8)][group] = element<T>(one.b, i);
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* const sums = static_cast<Product*>(lanes[lane])->sums;
    for (int i = 0; i < 4; ++i) {
      const int row = (lane >> 2) + (i < 2 ? 0 : 8), column = lane % 4 * 2 + (i & 1);
      for (int k = 0; k < 16; ++k) sums[i] += a[row][k] * b[k][column];
    }
  }
}

template <class T>
void mma(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Product mine{sums, a, b};
  wait_for_lanes("mma", 0xffffffff, multiply<T>, &mine);
}

}  // namespace dlvae::emulator

namespace dlvae {

// The bytes arrive at the wait; until then, the memory holds poison.
inline void cp_async16(void* to, const void* from, int bytes) {
  emulator::check_aligned("cp_async16", to);
  emulator::check_aligned("cp_async16", from);
  if (bytes < 0 || bytes > 16) emulator::fail("cp_async16: " + std::to_string(bytes) + " bytes");
  emulator::Copy copy{to, emulator::current->groups, {}};
  std::memcpy(copy.bytes, from, bytes);
  emulator::current->copies.push_back(copy);
  std::memset(to, 0xff, 16);
}

inline void cp_async_commit() { ++emulator::current->groups; }

template <int PENDING>
void cp_async_wait() {
  emulator::Fiber& self = *emulator::current;
  size_t kept = 0;
  for (const emulator::Copy& copy : self.copies) {
    if (copy.group < self.groups - PENDING) {
      std::memcpy(copy.to, copy.bytes, 16);
    } else {
      self.copies[kept++] = copy;
    }
  }
  self.copies.resize(kept);
}

inline void ldmatrix_x4(uint32_t (&to)[4], const void* row) { emulator::ldmatrix<4, false>("ldmatrix_x4", to, row); }
inline void ldmatrix_x2(uint32_t (&to)[2], const void* row) { emulator::ldmatrix<2, false>("ldmatrix_x2", to, row); }
inline void ldmatrix_x4_trans(uint32_t (&to)[4], const void* row) {
  emulator::ldmatrix<4, true>("ldmatrix_x4_trans", to, row);
}

template <class T>
void mma_m16n8k16(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma<T>(sums, a, b);
}

template <class T>
T* dynamic_shared() {
  return static_cast<T*>(emulator::shared_memory);
}

}  // namespace dlvae
