#include "sort.h"

#if defined(DLVAE_EMULATE_CUDA)
#include <algorithm>
#include <numeric>
#else
#include <cub/device/device_radix_sort.cuh>
#endif

namespace dlvae {

#if defined(DLVAE_EMULATE_CUDA)

void sort_places(
    const Tensor&, const uint32_t* keys, int64_t count, int, uint32_t* sorted, uint32_t* places, const Device&) {
  std::iota(places, places + count, 0u);
  std::stable_sort(places, places + count, [&](uint32_t a, uint32_t b) { return keys[a] < keys[b]; });
  std::transform(places, places + count, sorted, [&](uint32_t place) { return keys[place]; });
}

#else

namespace {

__global__ void places_kernel(int64_t count, uint32_t* places) {
  const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) places[i] = (uint32_t)i;
}

}  // namespace

void sort_places(
    const Tensor& like, const uint32_t* keys, int64_t count, int bits, uint32_t* sorted, uint32_t* places,
    const Device& device) {
  const Tensor numbers = new_tensor(like, {count}, ScalarType::Int);
  uint32_t* const unsorted = data_of<uint32_t>(numbers);
  launch("places", places_kernel, blocks(ceil_div(count, 256)), 256, 0, device.stream, count, unsorted);
  const auto sort = [&](void* room, size_t& bytes) {
    const cudaError_t error = cub::DeviceRadixSort::SortPairs(
        room, bytes, keys, sorted, unsorted, places, static_cast<int>(count), 0, bits, device.stream);
    STD_TORCH_CHECK(error == cudaSuccess, "sort: CUDA error: ", cudaGetErrorString(error));
  };
  size_t bytes = 0;
  sort(nullptr, bytes);
  const Tensor room = new_tensor(like, {(int64_t)bytes}, ScalarType::Byte);
  sort(room.data_ptr(), bytes);
}

#endif

}  // namespace dlvae
