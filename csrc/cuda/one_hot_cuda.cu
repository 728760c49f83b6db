#include <cstring>

#include "../operations.h"
#include "launch.h"

namespace dlvae {
namespace {

constexpr int THREADS = 256;
// The number of bytes that a block writes; a row that is larger takes one block.
constexpr int64_t BYTES = 16384;

struct Bits128 {
  uint64_t parts[2];
};

// A block zeroes its rows and then writes the ones while the rows are in the cache. Its memory is aligned to 16 bytes.
template <class Element>
__global__ void __launch_bounds__(THREADS) one_hot_kernel(
    const int64_t* __restrict__ indices, int64_t num_rows, int64_t kept, int64_t num_codes, int rows_per_block,
    Element one, Element* __restrict__ out) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * rows_per_block;
  const int64_t rows = num_rows - first < rows_per_block ? num_rows - first : rows_per_block;
  Element* const to = out + first * num_codes;
  const int64_t bytes = rows * num_codes * static_cast<int64_t>(sizeof(Element)), vectors = bytes / 16;
  for (int64_t i = threadIdx.x; i < vectors; i += THREADS) reinterpret_cast<uint4*>(to)[i] = make_uint4(0, 0, 0, 0);
  for (int64_t i = vectors * 16 + threadIdx.x; i < bytes; i += THREADS) reinterpret_cast<unsigned char*>(to)[i] = 0;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < rows * kept; i += THREADS) {
    const int64_t index = indices[first * kept + i];
    // An index out of range is skipped.
    if (index >= 0 && index < num_codes) to[i / kept * num_codes + index] = one;
  }
}

template <class Element>
void write(const Tensor& indices, int64_t kept, const Tensor& one, const Tensor& out) {
  Element bits;
  std::memcpy(&bits, one.data_ptr(), sizeof(Element));
  const int64_t num_rows = out.size(0), num_codes = out.size(1);
  const int64_t row_bytes = num_codes * static_cast<int64_t>(sizeof(Element));
  // This many rows are whole vectors.
  const int64_t unit = 16 / widest_unit({row_bytes});
  const int64_t rows = unit * ceil_div(BYTES, unit * row_bytes);
  const Device device(out);
  launch(
      "one_hot", one_hot_kernel<Element>, blocks(ceil_div(num_rows, rows)), THREADS, 0, device.stream,
      data_of<const int64_t>(indices), num_rows, kept, num_codes, static_cast<int>(rows), bits, data_of<Element>(out));
}

}  // namespace

Tensor one_hot(const Tensor& indices, int64_t num_codes, ScalarType dtype) {
  STD_TORCH_CHECK(
      indices.dim() == 1 || indices.dim() == 2, "expected indices of shape [N] or [N, k], got ", shape_text(indices));
  STD_TORCH_CHECK(num_codes >= 1, "expected num_codes to be at least 1, got ", num_codes);
  const Tensor ones = indices_of("indices", indices);
  const int64_t kept = indices.dim() == 2 ? indices.size(1) : 1;
  const Tensor out = new_tensor(indices, {indices.size(0), num_codes}, dtype);
  // torch provides the bits of a 1 of any type.
  const Tensor one = torch::stable::fill_(
      torch::stable::empty({1}, dtype, {}, torch::stable::Device(torch::headeronly::DeviceType::CPU)), 1);
  switch (out.element_size()) {
    case 1: write<uint8_t>(ones, kept, one, out); break;
    case 2: write<uint16_t>(ones, kept, one, out); break;
    case 4: write<uint32_t>(ones, kept, one, out); break;
    case 8: write<uint64_t>(ones, kept, one, out); break;
    default:
      STD_TORCH_CHECK(
          out.element_size() == 16, "expected a dtype of 1, 2, 4, 8 or 16 bytes, got ", out.element_size(), " bytes");
      write<Bits128>(ones, kept, one, out);
  }
  return out;
}

}  // namespace dlvae
