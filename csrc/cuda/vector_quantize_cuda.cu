#include "../operations.h"
#include "launch.h"
#include "rows_cuda.cuh"
#include "search_cuda.h"
#include "segment_sum_cuda.h"

namespace dlvae {
namespace {

// Writes the nearest codes of 32 rows and half their errors unless half_error has no data; adds up squared errors and
// counts. Half of a difference of float16 numbers does not overflow float16. A row that is not valid by the mask, which
// may be null, gets index -1 and zeros.
__global__ void __launch_bounds__(RowBlock::THREADS) quantize_kernel(
    Rows x, Rows codes, int64_t heads, const bool* mask, int64_t* indices, Rows quantized, Rows half_error,
    double* losses, unsigned long long* counts) {
  __shared__ int64_t offsets[4][RowBlock::ROWS];
  __shared__ RowBlock::Tile rows, picked;
  const int64_t first = (int64_t)blockIdx.x * RowBlock::ROWS;
  const RowBlock from(x, first, x.count, offsets[0]), to(quantized, first, x.count, offsets[1]);
  const RowBlock errors(half_error, first, x.count, offsets[2]);
  if ((int)threadIdx.x < from.count) {
    const int64_t row = first + threadIdx.x, code = flat_code(row, indices[row], heads, codes.count / heads);
    const bool is_valid = mask == nullptr || mask[row];
    offsets[3][threadIdx.x] = is_valid ? row_offset(codes, code) : -1;
    if (is_valid) {
      atomicAdd(counts + code, 1ull);
    } else {
      indices[row] = -1;
    }
  }
  __shared__ double of_warps[WARP];
  double loss = 0;
  for (int64_t feature = 0; feature < x.features; feature += RowBlock::FEATURES) {
    __syncthreads();
    from.load(feature, rows);
    // The features of a code are usually adjacent.
    const int64_t d = feature + lane_index();
    for (int row = warp_index(); row < from.count && d < x.features; row += RowBlock::WARPS)
      picked[row][lane_index()] = offsets[3][row] < 0 ? 0 : load_element(codes, offsets[3][row] + d * codes.stride);
    __syncthreads();
    to.store(feature, picked);
    from.for_each(feature, [&](int row, int i) {
      const float difference = offsets[3][row] < 0 ? 0 : picked[row][i] - rows[row][i];
      loss += (double)difference * difference;
      rows[row][i] = 0.5f * difference;
    });
    if (half_error.data == nullptr) continue;
    __syncthreads();
    errors.store(feature, rows);
  }
  loss = block_reduce(loss, Sum{}, of_warps);
  if (threadIdx.x == 0) losses[blockIdx.x] = loss;
}

// One block computes the mean of the results of all blocks in a fixed order. It divides by `elements`, or with
// `counts`, which is null without a mask, by the elements of the valid vectors.
__global__ void mean_kernel(
    const double* losses, int64_t count, int64_t elements, const unsigned long long* counts, int64_t num_codes,
    int64_t features, float* codebook_loss, float* commitment_loss) {
  __shared__ double of_warps[WARP];
  if (counts != nullptr) {
    double vectors = 0;
    for (int64_t i = threadIdx.x; i < num_codes; i += blockDim.x) vectors += (double)counts[i];
    vectors = block_reduce(vectors, Sum{}, of_warps);
    elements = vectors > 0 ? (int64_t)vectors * features : 1;
  }
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) sum += losses[i];
  sum = block_reduce(sum, Sum{}, of_warps);
  if (threadIdx.x == 0) *codebook_loss = *commitment_loss = (float)(sum / elements);
}

// grad_x = grad_quantized - slope * half_error, where slope includes the gradient of the loss; 0 where the index is -1.
__global__ void __launch_bounds__(RowBlock::THREADS) grad_rows_kernel(
    Rows grad, Rows half_error, const int64_t* indices, float slope, const float* grad_loss, Rows grad_x) {
  __shared__ int64_t offsets[3][RowBlock::ROWS];
  __shared__ bool is_valid[RowBlock::ROWS];
  __shared__ RowBlock::Tile grads, errors;
  const int64_t first = (int64_t)blockIdx.x * RowBlock::ROWS;
  const RowBlock from(grad, first, half_error.count, offsets[0]);
  const RowBlock of_error(half_error, first, half_error.count, offsets[1]);
  const RowBlock to(grad_x, first, half_error.count, offsets[2]);
  if ((int)threadIdx.x < to.count) is_valid[threadIdx.x] = indices[first + threadIdx.x] >= 0;
  const float factor = slope * *grad_loss;
  for (int64_t feature = 0; feature < half_error.features; feature += RowBlock::FEATURES) {
    __syncthreads();
    from.load(feature, grads);
    of_error.load(feature, errors);
    __syncthreads();
    to.for_each(feature, [&](int row, int i) {
      const int64_t at = offsets[2][row] + (feature + i) * grad_x.stride;
      store_element(grad_x, at, is_valid[row] ? grads[row][i] - factor * errors[row][i] : 0);
    });
  }
}

__global__ void scale_kernel(const float* grad_loss, float slope, float* scale) { *scale = *grad_loss * slope; }

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> vector_quantize_fwd(
    const Tensor& x, const Tensor& codebook, bool need_error, std::string precision, OptionalTensor mask) {
  const Device device(x);
  const int64_t heads = heads_of(codebook);
  const Rows rows = rows_of("x", x), codes = codes_of("codebook", codebook, rows, true);
  if (mask.has_value()) mask = mask_of("mask", *mask, rows);
  const Tensor indices = new_tensor(x, shape_with(x, {}), ScalarType::Long);
  const Tensor counts = new_zeroed(x, shape_with(codebook, {}), ScalarType::Long);
  const Tensor codebook_loss = new_tensor(x, {}), commitment_loss = new_tensor(x, {});
  const Tensor quantized = new_like(x);
  const Tensor half_error = need_error ? new_like(x) : new_tensor(x, {0}, x.scalar_type());
  const unsigned parts = RowBlock::blocks_of(rows.count);
  const Tensor losses = new_tensor(x, {parts}, ScalarType::Double);
  double* const found = data_of<double>(losses);
  int64_t* const to = data_of<int64_t>(indices);
  auto* const count = reinterpret_cast<unsigned long long*>(data_of<int64_t>(counts));
  search(x, rows_by_head("x", x, heads), codes, to, device, heads);
  launch(
      "quantize", quantize_kernel, parts, RowBlock::THREADS, 0, device.stream, rows, codes, heads,
      mask.has_value() ? data_of<bool>(*mask) : nullptr, to, rows_of("quantized", quantized),
      need_error ? rows_of("half_error", half_error) : Rows{}, found, count);
  launch(
      "mean", mean_kernel, 1, 1024, 0, device.stream, found, parts, std::max<int64_t>(1, x.numel()),
      mask.has_value() ? count : nullptr, codes.count, rows.features, data_of<float>(codebook_loss),
      data_of<float>(commitment_loss));
  return {quantized, indices, codebook_loss, commitment_loss, counts, half_error};
}

std::tuple<Tensor, Tensor> vector_quantize_bwd(
    const Tensor& grad_quantized, const Tensor& grad_codebook_loss, const Tensor& grad_commitment_loss,
    const Tensor& half_error, const Tensor& indices, int64_t num_codes, int64_t num_heads, bool need_x,
    bool need_codebook) {
  const Device device(half_error);
  const Rows errors = rows_of("half_error", half_error), grad = rows_of("grad_quantized", grad_quantized);
  STD_TORCH_CHECK(
      shape_of(grad_quantized) == shape_of(half_error), "expected grad_quantized of the shape of half_error, ",
      shape_text(half_error), ", got ", shape_text(grad_quantized));
  STD_TORCH_CHECK(
      indices.numel() == errors.count, "expected one index for each of the ", errors.count,
      " vectors of half_error, got ", indices.numel());
  // d mean((q - x)^2) / d q, before the gradient of either loss is multiplied in.
  const float slope = (float)(4.0 / std::max<int64_t>(1, half_error.numel()));
  const Tensor codes = indices_of("indices", indices);
  const Tensor grad_x = need_x ? new_like(half_error) : new_tensor(half_error, {0});
  if (need_x) {
    launch(
        "grad_rows", grad_rows_kernel, RowBlock::blocks_of(errors.count), RowBlock::THREADS, 0, device.stream, grad,
        errors, data_of<int64_t>(codes), slope, number_of("grad_commitment_loss", grad_commitment_loss),
        rows_of("grad_x", grad_x));
  }
  const Tensor grad_codebook = new_tensor(
      half_error,
      need_codebook ? std::vector<int64_t>{num_heads * num_codes, errors.features} : std::vector<int64_t>{0});
  if (need_codebook) {
    const Tensor scale = new_tensor(half_error, {1});
    float* const factor = data_of<float>(scale);
    launch(
        "scale", scale_kernel, 1, 1, 0, device.stream, number_of("grad_codebook_loss", grad_codebook_loss), slope,
        factor);
    const SortedPairs pairs(
        half_error, {data_of<int64_t>(codes), errors.count, 1, num_heads * num_codes, nullptr, nullptr, num_heads},
        device);
    pairs.sum(half_error, errors, factor, data_of<float>(grad_codebook), errors.features, device);
  }
  return {grad_x, grad_codebook};
}

}  // namespace dlvae
