#include "../operations.h"
#include "launch.h"
#include "rows_cuda.cuh"
#include "segment_sum_cuda.h"

namespace dlvae {
namespace {

constexpr int THREADS = 256;

// Sets for each row whether it holds NaN or infinity.
__global__ void __launch_bounds__(RowBlock::THREADS) not_finite_kernel(Rows x, bool* flags) {
  __shared__ int64_t offsets[RowBlock::ROWS];
  __shared__ int found[RowBlock::ROWS];
  const int64_t first = (int64_t)blockIdx.x * RowBlock::ROWS;
  const RowBlock block(x, first, x.count, offsets);
  if (threadIdx.x < RowBlock::ROWS) found[threadIdx.x] = 0;
  __syncthreads();
  for (int64_t feature = 0; feature < x.features; feature += RowBlock::FEATURES) {
    block.for_each(feature, [&](int row, int i) {
      const float value = load_element(x, offsets[row] + (feature + i) * x.stride);
      if (!(value - value == 0)) found[row] = 1;  // a benign race: all threads write the same value
    });
  }
  __syncthreads();
  if ((int)threadIdx.x < block.count) flags[first + threadIdx.x] = found[threadIdx.x] != 0;
}

__device__ float lerp(float from, float to, float weight) {
  // The same formula as torch.lerp, which is exact at both ends.
  return weight < 0.5f ? from + weight * (to - from) : to - (to - from) * (1 - weight);
}

// One block for each head, a row of `sizes`, updates the cluster sizes and adds them up in a fixed order.
__global__ void __launch_bounds__(1024) sizes_kernel(Rows sizes, Rows statistics, float weight, double* total) {
  __shared__ double of_warps[WARP];
  const int64_t first = blockIdx.x * sizes.features, sizes_at = row_offset(sizes, blockIdx.x);
  double sum = 0;
  for (int64_t code = threadIdx.x; code < sizes.features; code += blockDim.x) {
    const int64_t at = row_offset(statistics, first + code) + (statistics.features - 1) * statistics.stride;
    const int64_t size_at = sizes_at + code * sizes.stride;
    const float count = load_element(statistics, at);
    const float size = lerp(load_element(sizes, size_at), count, weight);
    store_element(sizes, size_at, size);
    sum += size;
  }
  sum = block_reduce(sum, Sum{}, of_warps);
  if (threadIdx.x == 0) total[blockIdx.x] = sum;
}

// One warp updates one code.
__global__ void codes_kernel(
    Rows codebook, Rows sizes, Rows sums, Rows statistics, float weight, double epsilon, const double* total) {
  const int64_t code = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
  if (code >= codebook.count) return;
  const int64_t at = row_offset(codebook, code), sum_at = row_offset(sums, code);
  const int64_t batch_at = row_offset(statistics, code);
  const float count = load_element(statistics, batch_at + codebook.features * statistics.stride);
  const int64_t head = code / sizes.features;
  const float size = load_element(sizes, row_offset(sizes, head) + (code - head * sizes.features) * sizes.stride);
  const double smoothed = (size + epsilon) / (total[head] + sizes.features * epsilon) * total[head];
  for (int64_t d = lane_index(); d < codebook.features; d += 32) {
    const float batch = load_element(statistics, batch_at + d * statistics.stride);
    const float sum = lerp(load_element(sums, sum_at + d * sums.stride), batch, weight);
    store_element(sums, sum_at + d * sums.stride, sum);
    // A code without vectors stays as it is.
    if (count > 0 && size > 0) store_element(codebook, at + d * codebook.stride, sum / (float)smoothed);
  }
}

}  // namespace

Tensor ema_statistics(const Tensor& x, const Tensor& indices, int64_t num_codes, int64_t num_heads) {
  const Device device(x);
  const Rows rows = rows_of("x", x);
  const Tensor codes = indices_of("indices", indices);
  STD_TORCH_CHECK(
      codes.numel() == rows.count, "expected one index for each of the ", rows.count, " vectors of x, got ",
      codes.numel());
  const Tensor statistics = new_tensor(x, {num_heads * num_codes, rows.features + 1});
  const Tensor left_out = new_tensor(x, {rows.count}, ScalarType::Bool);
  bool* const flags = data_of<bool>(left_out);
  launch(
      "not_finite", not_finite_kernel, RowBlock::blocks_of(rows.count), RowBlock::THREADS, 0, device.stream, rows,
      flags);
  const SortedPairs pairs(
      x, {data_of<int64_t>(codes), rows.count, 1, num_heads * num_codes, flags, nullptr, num_heads}, device);
  float* const to = data_of<float>(statistics);
  pairs.sum(x, rows, nullptr, to, rows.features + 1, device);
  pairs.count(to + rows.features, rows.features + 1, device);
  return statistics;
}

void ema_step(
    const Tensor& codebook, const Tensor& cluster_size, const Tensor& embed_sum, const Tensor& statistics, double decay,
    double epsilon) {
  const Device device(codebook);
  const Rows codes = rows_of("codebook", codebook), sums = rows_of("embed_sum", embed_sum);
  const Rows sizes = rows_of("cluster_size", cluster_size), batch = rows_of("statistics", statistics);
  const int64_t heads = heads_of(codebook);
  STD_TORCH_CHECK(
      sizes.count == heads && sizes.count * sizes.features == codes.count && sums.count == codes.count &&
          sums.features == codes.features && batch.count == codes.count && batch.features == codes.features + 1,
      "expected cluster_size, embed_sum and statistics of shapes [K], [K, D] and [K, D + 1] for codebook ",
      shape_text(codebook), ", got ", shape_text(cluster_size), ", ", shape_text(embed_sum), " and ",
      shape_text(statistics));
  const Tensor total = new_tensor(codebook, {heads}, ScalarType::Double);
  double* const at = data_of<double>(total);
  const float weight = (float)(1 - decay);
  launch("sizes", sizes_kernel, blocks(heads), 1024, 0, device.stream, sizes, batch, weight, at);
  launch(
      "codes", codes_kernel, blocks(ceil_div(codes.count, THREADS / WARP)), THREADS, 0, device.stream, codes, sizes,
      sums, batch, weight, epsilon, at);
}

}  // namespace dlvae
