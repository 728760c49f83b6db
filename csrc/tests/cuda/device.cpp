#include "../../cuda/launch.h"

namespace dlvae {

// The CPU is the GPU.
void check_device(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " is not on the CPU");
}

// The oldest that there are kernels for, and the least that any of them has; few multiprocessors, so that small inputs
// are more than one block each.
cuda::Device::Device(const Tensor&) : stream(nullptr), capability(80), multiprocessors(3), shared_bytes(99 * 1024) {}

}  // namespace dlvae
