// A block of threads that are fibers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "vectors.h"

namespace dlvae::emulator {

// An asynchronous copy of 16 bytes to shared memory.
struct Copy {
  void* to;
  int group;
  unsigned char bytes[16];
};

// A collective operation of the lanes of a warp: lanes[i] is the operand of lane i, `present` is the mask of arrived
// lanes.
using Together = void (*)(void* const* lanes, uint32_t present);

struct Fiber {
  uint3 thread;
  int number;  // index in the block
  int warp, lane;

  void* stack_pointer;  // while the thread does not run
  void* stack;          // lowest address
  size_t stack_bytes;
  void* fake_stack;  // of the address sanitizer

  // Where the thread waits: at a barrier of the block (no operation) or for the lanes of a mask.
  const char* waits_at;
  Together operation;
  uint32_t mask;
  void* operand;  // what the thread passes to `operation`

  std::vector<Copy> copies;
  int groups;  // number of committed groups of copies
};

extern Fiber* current;
extern dim3 block_index, block_size, grid_size;
// Dynamic shared memory of exactly the requested size.
extern void* shared_memory;

// Waits until all live threads of the block have arrived.
void wait_for_block();
// Waits until all live lanes of the mask have arrived at the same operation, which then runs once.
void wait_for_lanes(const char* name, uint32_t mask, Together operation, void* operand);

// Ends the launch with this error.
[[noreturn]] void fail(const std::string& what);

// Returns the value of memory that has not been written: NaN, or -1.
template <class T>
T poison() {
  T value;
  std::memset(static_cast<void*>(&value), 0xff, sizeof(T));
  return value;
}

using Body = void (*)(const void* kernel);
void run(const char* name, dim3 grid, dim3 block, size_t shared_bytes, Body body, const void* kernel);

// Runs kernel() in each thread of each block.
template <class F>
void run(const char* name, dim3 grid, dim3 block, size_t shared_bytes, const F& kernel) {
  run(name, grid, block, shared_bytes, [](const void* f) { (*static_cast<const F*>(f))(); }, &kernel);
}

}  // namespace dlvae::emulator

#define threadIdx (dlvae::emulator::current->thread)
#define blockIdx (dlvae::emulator::block_index)
#define blockDim (dlvae::emulator::block_size)
#define gridDim (dlvae::emulator::grid_size)

inline void __syncthreads() { dlvae::emulator::wait_for_block(); }
