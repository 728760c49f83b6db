#include "../operations.h"
#include "launch.h"
#include "rows_cuda.cuh"
#include "search_cuda.h"

namespace dlvae {
namespace {

constexpr int THREADS = 256;

// One warp computes the squared distance of one row from its code.
__global__ void distances_kernel(Rows x, Rows codes, int64_t heads, const int64_t* indices, float* distances) {
  const int64_t row = ((int64_t)blockIdx.x * THREADS + threadIdx.x) / WARP;
  if (row >= x.count) return;
  const int64_t code = flat_code(row, indices[row], heads, codes.count / heads);
  const int64_t at = row_offset(x, row), code_at = row_offset(codes, code);
  float sum = 0;
  for (int64_t d = lane_index(); d < x.features; d += 32) {
    const float difference = load_element(x, at + d * x.stride) - load_element(codes, code_at + d * codes.stride);
    sum += difference * difference;
  }
  sum = warp_reduce(sum, Sum{});
  if (lane_index() == 0) distances[row] = sum;
}

}  // namespace

std::tuple<Tensor, Tensor> nearest_code(
    const Tensor& x, const Tensor& codebook, bool return_distance, std::string precision) {
  const Device device(x);
  const int64_t heads = heads_of(codebook);
  const Rows rows = rows_of("x", x), codes = codes_of("codebook", codebook, rows, true);
  const Tensor indices = new_tensor(x, shape_with(x, {}), ScalarType::Long);
  const Tensor distances = new_tensor(x, return_distance ? shape_with(x, {}) : std::vector<int64_t>{0});
  int64_t* const to = data_of<int64_t>(indices);
  search(x, rows_by_head("x", x, heads), codes, to, device, heads);
  if (return_distance) {
    launch(
        "distances", distances_kernel, blocks(ceil_div(rows.count, THREADS / WARP)), THREADS, 0, device.stream, rows,
        codes, heads, to, data_of<float>(distances));
  }
  return {indices, distances};
}

int64_t uncertain_rows(const Tensor& x, const Tensor& codebook) {
  const Device device(x);
  const int64_t heads = heads_of(codebook);
  const Rows rows = rows_by_head("x", x, heads), codes = codes_of("codebook", codebook, rows, true);
  const Tensor indices = new_tensor(x, {rows.count}, ScalarType::Long);
  const Tensor listed = search(x, rows, codes, data_of<int64_t>(indices), device, heads);
  int32_t count;
  TORCH_ERROR_CODE_CHECK(aoti_torch_item_int32(listed.get(), &count));
  return count;
}

}  // namespace dlvae
