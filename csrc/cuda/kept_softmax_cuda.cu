// softmax(x W^T + b) at the kept codes, and its gradients. Logits are computed for a chunk of rows at a time.
#include "../operations.h"
#include "logits.h"
#include "parts.cuh"
#include "rows_cuda.cuh"

namespace dlvae {
namespace {

constexpr int THREADS = 256;

struct Kept {
  const int64_t* indices;  // [N, k]; the value of an index outside [0, K) is 0
  int64_t k, codes;
  float* values;  // [N, k]
  float* sums;    // [N, 2]: the largest logit m, and the sum of exp(logit - m)
};

// One block processes one row.
__global__ void __launch_bounds__(THREADS) softmax_kernel(Kept kept, int64_t begin, const float* logits) {
  const int64_t row = begin + blockIdx.x;
  const float* const own = logits + (int64_t)blockIdx.x * kept.codes;
  __shared__ float of_warps[WARP];
  // The maximum ignores NaN, the sum does not.
  float largest = -INFINITY;
  for (int64_t i = threadIdx.x; i < kept.codes; i += THREADS) largest = fmaxf(largest, own[i]);
  largest = block_reduce(largest, Greatest{}, of_warps);
  float sum = 0;
  for (int64_t i = threadIdx.x; i < kept.codes; i += THREADS) sum += expf(own[i] - largest);
  sum = block_reduce(sum, Sum{}, of_warps);
  for (int64_t j = threadIdx.x; j < kept.k; j += THREADS) {
    const int64_t code = kept.indices[row * kept.k + j];
    const bool is_in = code >= 0 && code < kept.codes;
    kept.values[row * kept.k + j] = is_in ? expf(own[code] - largest) / sum : 0;
  }
  if (threadIdx.x == 0) kept.sums[2 * row] = largest, kept.sums[2 * row + 1] = sum;
}

// One block processes one row: it replaces logits by their gradients p (g - sum of g p), where g is the gradient of the
// kept values and 0 for other codes.
__global__ void __launch_bounds__(THREADS)
    grad_logits_kernel(Kept kept, const float* grad, int64_t begin, float* logits) {
  const int64_t row = begin + blockIdx.x;
  float* const own = logits + (int64_t)blockIdx.x * kept.codes;
  __shared__ float of_warps[WARP];
  float slope = 0;
  for (int64_t j = row * kept.k + threadIdx.x; j < (row + 1) * kept.k; j += THREADS) slope += grad[j] * kept.values[j];
  slope = block_reduce(slope, Sum{}, of_warps);
  const float largest = kept.sums[2 * row], scale = 1 / kept.sums[2 * row + 1];
  for (int64_t i = threadIdx.x; i < kept.codes; i += THREADS) own[i] = expf(own[i] - largest) * scale * -slope;
  // Each thread owns some codes, so that the gradients of a code that a row keeps twice are added in order.
  for (int64_t j = row * kept.k; j < (row + 1) * kept.k; ++j) {
    const int64_t code = kept.indices[j];
    if (code >= 0 && code < kept.codes && code % THREADS == threadIdx.x) own[code] += grad[j] * kept.values[j];
  }
}

Kept kept_of(const Tensor& indices, int64_t rows, int64_t codes, const Tensor& values, const Tensor& sums) {
  const int64_t k = indices.size(indices.dim() - 1);
  STD_TORCH_CHECK(
      indices.numel() == rows * k, "expected indices of shape [..., k] for the ", rows, " vectors of x, got ",
      shape_text(indices));
  return {data_of<int64_t>(indices), k, codes, data_of<float>(values), data_of<float>(sums)};
}

}  // namespace

std::tuple<Tensor, Tensor> kept_softmax_fwd(
    const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, const Tensor& indices) {
  const Device device(x);
  const Logits logits(x, weight, bias, device);
  const Tensor which = indices_of("indices", indices);
  const Tensor values = new_tensor(x, shape_of(indices)), sums = new_tensor(x, shape_with(x, {2}));
  const Kept kept = kept_of(which, logits.rows.count, logits.codes.count, values, sums);
  logits.for_chunks([&](int64_t begin, int64_t count, const float* data) {
    launch("softmax", softmax_kernel, blocks(count), THREADS, 0, device.stream, kept, begin, data);
  });
  return {values, sums};
}

std::tuple<Tensor, Tensor, Tensor> kept_softmax_bwd(
    const Tensor& grad, const Tensor& values, const Tensor& sums, const Tensor& x, const Tensor& weight,
    std::optional<Tensor> bias, const Tensor& indices, bool need_x, bool need_weight, bool need_bias) {
  const Device device(x);
  const Logits logits(x, weight, bias, device);
  const Rows &rows = logits.rows, &codes = logits.codes;
  const Tensor which = indices_of("indices", indices), of_values = in_float32("grad", grad, device);
  const Tensor saved = in_float32("values", values, device), saved_sums = in_float32("sums", sums, device);
  const Kept kept = kept_of(which, rows.count, codes.count, saved, saved_sums);
  STD_TORCH_CHECK(
      grad.numel() == which.numel() && values.numel() == which.numel() && sums.numel() == 2 * rows.count,
      "expected grad and values of the shape of indices, ", shape_text(indices), ", and sums of shape [..., 2], got ",
      shape_text(grad), ", ", shape_text(values), " and ", shape_text(sums));
  const Tensor grad_bias = new_zeroed(x, {need_bias ? codes.count : 0});
  LogitGradients gradients(x, weight, logits, need_x, need_weight, device);
  logits.for_chunks([&](int64_t begin, int64_t count, float* data) {
    launch(
        "grad_logits", grad_logits_kernel, blocks(count), THREADS, 0, device.stream, kept, data_of<float>(of_values),
        begin, data);
    gradients.add(begin, count, data);
    if (need_bias) add_columns(data, count, codes.count, data_of<float>(grad_bias), device);
  });
  return {gradients.grad_x, gradients.grad_weight, grad_bias};
}

}  // namespace dlvae
