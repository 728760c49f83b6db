#include "../operations.h"
#include "launch.h"
#include "segment_sum_cuda.h"

namespace dlvae {
namespace {

constexpr int THREADS = 256;

// 1 << column_bits adjacent threads copy a row of `units`. Strides are in units. Row r belongs to head r % heads.
template <class Unit>
__global__ void __launch_bounds__(THREADS) gather_codes_kernel(
    const Unit* __restrict__ codes, int64_t heads, int64_t stride_head, int64_t stride_k, int64_t stride_d,
    int64_t num_codes, const int64_t* __restrict__ indices, int64_t num_rows, int64_t units, int column_bits,
    Unit* __restrict__ out) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  const int64_t row = thread >> column_bits, columns = int64_t{1} << column_bits;
  if (row >= num_rows) return;
  const int64_t index = indices[row], start = heads == 1 ? 0 : row % heads * stride_head;
  // An index out of range reads nothing and writes 0.
  const bool is_valid = index >= 0 && index < num_codes;
  for (int64_t i = thread & (columns - 1); i < units; i += columns) {
    out[row * units + i] = is_valid ? codes[start + index * stride_k + i * stride_d] : Unit{};
  }
}

template <class Unit>
void gather(const Tensor& codebook, const Tensor& indices, const Tensor& out) {
  const int64_t size = codebook.element_size(), unit = sizeof(Unit);
  const int64_t num_rows = indices.numel(), units = codebook.size(-1) * size / unit;
  int column_bits = 0;
  while (column_bits < 5 && 1 << column_bits < units) ++column_bits;
  // If a unit holds more than one element, the elements are adjacent.
  const int64_t stride_d = unit == size ? codebook.stride(-1) : 1;
  const Device device(codebook);
  launch(
      "gather_codes", gather_codes_kernel<Unit>, blocks(ceil_div(num_rows << column_bits, THREADS)), THREADS, 0,
      device.stream, data_of<const Unit>(codebook), heads_of(codebook), codebook.stride(0) * size / unit,
      codebook.stride(-2) * size / unit, stride_d, codebook.size(-2), data_of<const int64_t>(indices), num_rows, units,
      column_bits, data_of<Unit>(out));
}

}  // namespace

Tensor gather_codes_fwd(const Tensor& codebook, const Tensor& indices) {
  check_device("codebook", codebook);
  type_of("codebook", codebook);
  STD_TORCH_CHECK(
      codebook.dim() == 2 || codebook.dim() == 3, "expected codebook of shape [K, D] or [H, K, D], got ",
      shape_text(codebook));
  STD_TORCH_CHECK(
      codebook.dim() == 2 || (indices.dim() >= 1 && indices.size(-1) == codebook.size(0)),
      "expected indices of shape [..., H] with H = ", heads_of(codebook), " as in codebook, got ", shape_text(indices));
  const Tensor which = indices_of("indices", indices);
  std::vector<int64_t> shape = shape_of(indices);
  shape.push_back(codebook.size(-1));
  const Tensor out = new_tensor(codebook, shape, codebook.scalar_type());
  const int64_t size = codebook.element_size();
  const bool is_adjacent = codebook.size(-1) == 1 || codebook.stride(-1) == 1;
  const int64_t row_bytes = codebook.size(-1) * size, stride_k = codebook.stride(-2), stride_head = codebook.stride(0);
  const int unit = is_adjacent ? widest_unit({address_of(codebook), row_bytes, stride_k * size, stride_head * size})
                               : static_cast<int>(size);
  switch (unit) {
    case 2: gather<uint16_t>(codebook, which, out); break;
    case 4: gather<uint32_t>(codebook, which, out); break;
    case 8: gather<uint2>(codebook, which, out); break;
    default: gather<uint4>(codebook, which, out); break;
  }
  return out;
}

Tensor gather_codes_bwd(const Tensor& grad, const Tensor& indices, int64_t num_codes, int64_t num_heads) {
  const Device device(grad);
  const Rows rows = rows_of("grad", grad);
  const Tensor codes = indices_of("indices", indices);
  STD_TORCH_CHECK(
      codes.numel() == rows.count, "expected one index for each of the ", rows.count, " vectors of grad, got ",
      codes.numel());
  const Tensor sums = new_tensor(grad, {num_heads * num_codes, rows.features});
  const SortedPairs pairs(
      grad, {data_of<int64_t>(codes), rows.count, 1, num_heads * num_codes, nullptr, nullptr, num_heads}, device);
  pairs.sum(grad, rows, nullptr, data_of<float>(sums), rows.features, device);
  return sums;
}

}  // namespace dlvae
