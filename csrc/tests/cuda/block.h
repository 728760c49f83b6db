// A block of threads that are fibers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "vectors.h"

namespace dlvae::emulator {

// A copy of 16 bytes on its way to shared memory.
struct Copy {
  void* to;
  int group;
  unsigned char bytes[16];
};

// What the lanes of a warp do at once: lanes[i] is what lane i brought, `present` are those that came.
using Together = void (*)(void* const* lanes, uint32_t present);

struct Fiber {
  uint3 thread;
  int number;  // in the block
  int warp, lane;

  void* stack_pointer;  // while it doesn't run
  void* stack;          // from its lowest address
  size_t stack_bytes;
  void* fake_stack;  // of the address sanitizer

  // Where it waits: at a barrier of the block (no operation) or for the lanes of a mask.
  const char* waits_at;
  Together operation;
  uint32_t mask;
  void* brings;

  std::vector<Copy> copies;
  int groups;  // of copies, that were committed
};

extern Fiber* current;
extern dim3 block_index, block_size, grid_size;
// Dynamic shared memory, of just the size that was asked for.
extern void* shared_memory;

// Waits until all threads of the block that have not ended are here.
void wait_for_block();
// Waits until all lanes of the mask that have not ended are at the same operation, which then runs once.
void wait_for_lanes(const char* name, uint32_t mask, Together operation, void* brings);

// Ends the launch with this error.
[[noreturn]] void fail(const std::string& what);

// What a value is that nobody wrote: NaN, -1.
template <class T>
T poison() {
  T value;
  std::memset(static_cast<void*>(&value), 0xff, sizeof(T));
  return value;
}

using Body = void (*)(const void* kernel);
void run(const char* name, dim3 grid, dim3 block, size_t shared_bytes, Body body, const void* kernel);

// kernel() as each thread of each block.
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
