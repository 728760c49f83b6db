#include "../../cuda/launch.h"

namespace dlvae {

// The CPU takes the place of the GPU.
void check_device(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cpu(), "expected ", name, " on the CPU, got a tensor on another device");
}

// The oldest supported architecture with the smallest supported shared memory; few multiprocessors and small chunks, so
// that small inputs take several blocks and several chunks.
Device::Device(const Tensor&)
    : stream(nullptr), capability(80), multiprocessors(3), shared_bytes(99 * 1024), chunk_elements(1 << 15) {}

}  // namespace dlvae
