#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <mutex>

#include "launch.h"

// Exported by torch's CUDA library. The headers declare it only in a CUDA build of torch.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace dlvae {

void check_device(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cuda(), "expected ", name, " on a CUDA device, got a tensor on another device");
}

namespace {

// The shared memory that a block may use without opting in to more.
constexpr int64_t SHARED_BYTES = 48 * 1024;
constexpr int MAX_DEVICES = 64;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  // Clears the error, so that the next call does not report it.
  cudaGetLastError();
  STD_TORCH_CHECK(false, what, ": CUDA error: ", cudaGetErrorString(error));
}

struct Properties {
  std::once_flag once;
  int capability, multiprocessors, shared_bytes;
};

int attribute(cudaDeviceAttr name, int device) {
  int value;
  check(cudaDeviceGetAttribute(&value, name, device), "properties of the device");
  return value;
}

const Properties& properties(int device) {
  static std::array<Properties, MAX_DEVICES> devices;
  Properties& found = devices.at(device);
  std::call_once(found.once, [&] {
    found.capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                       attribute(cudaDevAttrComputeCapabilityMinor, device);
    found.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
    found.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  });
  return found;
}

}  // namespace

Device::Device(const Tensor& tensor) {
  const int device = tensor.get_device_index();
  guard_ = std::make_shared<torch::stable::accelerator::DeviceGuard>(device);
  // This library has a CUDA runtime of its own, whose current device is not torch's.
  check(cudaSetDevice(device), "the device of a tensor");
  void* current;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
  stream = static_cast<cudaStream_t>(current);
  const Properties& found = properties(device);
  capability = found.capability;
  multiprocessors = found.multiprocessors;
  shared_bytes = found.shared_bytes;
  chunk_elements = 1 << 24;
}

void launch_pointer(
    const char* name, const void* kernel, dim3 grid, dim3 block, int64_t shared_bytes, cudaStream_t stream,
    void** args) {
  if (shared_bytes > SHARED_BYTES) {
    const int bytes = static_cast<int>(shared_bytes);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), name);
  }
  check(cudaLaunchKernel(kernel, grid, block, args, static_cast<size_t>(shared_bytes), stream), name);
}

}  // namespace dlvae
