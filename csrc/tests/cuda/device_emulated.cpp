#include "../../cuda/launch.h"

namespace dlvae {

// The CPU is the GPU.
void check_device(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " is not on the CPU");
}

// The oldest that there are kernels for, and the least that any of them has; few multiprocessors and
// small chunks, so that small inputs are more than one block each, and more than one chunk.
Device::Device(const Tensor&)
    : stream(nullptr), capability(80), multiprocessors(3), shared_bytes(99 * 1024), chunk_elements(1 << 15) {}

}  // namespace dlvae
