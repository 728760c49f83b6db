#include "rows_cuda.cuh"

namespace dlvae {
namespace {

__global__ void __launch_bounds__(RowBlock::THREADS) widen_kernel(Rows rows, int64_t begin, int64_t end, float* to) {
  __shared__ int64_t offsets[RowBlock::ROWS];
  __shared__ RowBlock::Tile tile;
  const int64_t first = (int64_t)blockIdx.x * RowBlock::ROWS;
  const RowBlock block(rows, begin + first, end, offsets);
  for (int64_t feature = 0; feature < rows.features; feature += RowBlock::FEATURES) {
    __syncthreads();
    block.load(feature, tile);
    __syncthreads();
    const int64_t d = feature + lane_index();
    for (int row = warp_index(); row < block.count && d < rows.features; row += RowBlock::WARPS)
      to[(first + row) * rows.features + d] = tile[row][lane_index()];
  }
}

}  // namespace

Tensor rows_in_float32(const Tensor& like, const Rows& rows, int64_t begin, int64_t end, const Device& device) {
  const Tensor wide = new_tensor(like, {end - begin, rows.features});
  launch(
      "widen", widen_kernel, RowBlock::blocks_of(end - begin), RowBlock::THREADS, 0, device.stream, rows, begin, end,
      data_of<float>(wide));
  return wide;
}

Tensor in_float32(const char* name, const Tensor& tensor, const Device& device) {
  const Rows rows = rows_of(name, tensor);
  const bool is_adjacent = is_dense(rows) && (rows.count <= 1 || rows.strides[0] == rows.features);
  return is_adjacent ? tensor : rows_in_float32(tensor, rows, 0, rows.count, device);
}

}  // namespace dlvae
