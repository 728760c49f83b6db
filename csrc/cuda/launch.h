// Devices and kernel launches.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <memory>

#include "device.cuh"
#include "tensors_cuda.h"

namespace dlvae {

// The GPU of a tensor, which is the current device during the life of this object. Nothing here waits for the GPU.
class Device {
 public:
  explicit Device(const Tensor& tensor);

  cudaStream_t stream;  // torch's current stream
  int capability;       // 10 * major + minor
  int multiprocessors;
  int64_t shared_bytes;  // most shared memory of a block
  // The number of elements of scratch memory to use at a time: enough to fill the device, but small compared with its
  // memory.
  int64_t chunk_elements;

 private:
  std::shared_ptr<void> guard_;
};

template <class T>
struct As {
  using type = T;
};

#if !defined(DLVAE_EMULATE_CUDA)
void launch_pointer(
    const char* name, const void* kernel, dim3 grid, dim3 block, int64_t shared_bytes, cudaStream_t stream,
    void** args);
#endif

// Launches kernel<<<grid, block, shared_bytes, stream>>>(args...) unless the grid is empty. An error names the kernel.
template <class... Parameters>
void launch(
    const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, int64_t shared_bytes, cudaStream_t stream,
    typename As<Parameters>::type... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#if defined(DLVAE_EMULATE_CUDA)
  emulator::run(name, grid, block, shared_bytes, [&] { kernel(args...); });
#else
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&args))..., nullptr};
  launch_pointer(name, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, stream, pointers);
#endif
}

// Calls f with a value of the C++ type that corresponds to `type`.
template <class F>
void with_type(Type type, const F& f) {
  switch (type) {
    case Type::float32: return f(float());
    case Type::bfloat16: return f(__nv_bfloat16());
    case Type::float16: return f(__half());
  }
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Returns `count` as gridDim.x; throws if it exceeds 2^31 - 1.
inline unsigned blocks(int64_t count) {
  STD_TORCH_CHECK(count <= INT32_MAX, "expected a grid of at most ", INT32_MAX, " blocks, got ", count);
  return static_cast<unsigned>(count);
}

// Returns the largest power of two, up to 16, that divides all of `bytes`.
inline int widest_unit(std::initializer_list<int64_t> bytes) {
  int64_t all = 16;
  for (const int64_t each : bytes) all |= each;
  return static_cast<int>(all & -all);
}

inline int64_t address_of(const Tensor& tensor) { return reinterpret_cast<intptr_t>(tensor.data_ptr()); }

}  // namespace dlvae
