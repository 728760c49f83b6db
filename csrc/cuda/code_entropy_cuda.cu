// Entropies of soft assignments: the softmax of logits (2 x.c - |c|^2) / temperature, which is that of the negated
// squared distances, because |x|^2 is the same for all codes.
#include "../operations.h"
#include "logits.h"
#include "rows_cuda.cuh"

namespace dlvae {
namespace {

constexpr int THREADS = 256;
// exp of a lower logarithm is 0; minus infinity times 0 would be NaN.
constexpr float LEAST_LOGARITHM = -104;

// One block processes one code: weight = 2 c / temperature, bias = -|c|^2 / temperature.
__global__ void __launch_bounds__(THREADS)
    weight_kernel(Rows codes, float per_temperature, float* weight, float* bias) {
  __shared__ double of_warps[WARP];
  const int64_t offset = row_offset(codes, blockIdx.x);
  double squares = 0;
  // Unrolled, the loop would spill registers.
#pragma unroll 1
  for (int64_t d = threadIdx.x; d < codes.features; d += THREADS) {
    const float value = load_element(codes, offset + d * codes.stride);
    weight[blockIdx.x * codes.features + d] = 2 * per_temperature * value;
    squares += (double)value * value;
  }
  squares = block_reduce(squares, Sum{}, of_warps);
  if (threadIdx.x == 0) bias[blockIdx.x] = (float)(-squares * per_temperature);
}

// One block processes one row: it copies the row, or writes zeros if it is not valid.
__global__ void __launch_bounds__(THREADS) valid_kernel(Rows x, const bool* valid, float* to) {
  const int64_t offset = row_offset(x, blockIdx.x);
  for (int64_t d = threadIdx.x; d < x.features; d += THREADS)
    to[blockIdx.x * x.features + d] = valid[blockIdx.x] ? load_element(x, offset + d * x.stride) : 0;
}

// One block computes 1 over the number of valid rows.
__global__ void __launch_bounds__(THREADS) share_kernel(const bool* valid, int64_t rows, float* share) {
  __shared__ double of_warps[WARP];
  double count = 0;
  for (int64_t row = threadIdx.x; row < rows; row += THREADS) count += valid == nullptr || valid[row];
  count = block_reduce(count, Sum{}, of_warps);
  if (threadIdx.x == 0) *share = (float)(1 / (count < 1 ? 1 : count));
}

__global__ void scale_kernel(float* values, int64_t count, const float* factor) {
  const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) values[i] *= *factor;
}

struct Entropies {
  const bool* valid;  // [N], or null
  int64_t codes;
  float* sums;       // [N, 2]: the largest logit m, and the sum of exp(logit - m)
  float* entropies;  // [N]
};

// One block processes one row: it replaces logits by probabilities, zeros for a row that is not valid.
__global__ void __launch_bounds__(THREADS) entropy_kernel(Entropies e, int64_t begin, float* logits) {
  const int64_t row = begin + blockIdx.x;
  float* const own = logits + (int64_t)blockIdx.x * e.codes;
  __shared__ float of_warps[WARP];
  const bool is_valid = e.valid == nullptr || e.valid[row];
  // The maximum ignores NaN, the sum does not.
  float largest = -INFINITY;
  for (int64_t i = threadIdx.x; i < e.codes; i += THREADS) largest = fmaxf(largest, own[i]);
  largest = block_reduce(largest, Greatest{}, of_warps);
  float sum = 0, weighted = 0;
  for (int64_t i = threadIdx.x; i < e.codes; i += THREADS) {
    const float shifted = own[i] - largest, p = expf(shifted);
    sum += p;
    weighted += p * (shifted < LEAST_LOGARITHM ? LEAST_LOGARITHM : shifted);
  }
  sum = block_reduce(sum, Sum{}, of_warps);
  weighted = block_reduce(weighted, Sum{}, of_warps);
  for (int64_t i = threadIdx.x; i < e.codes; i += THREADS) own[i] = is_valid ? expf(own[i] - largest) / sum : 0;
  if (threadIdx.x > 0) return;
  e.sums[2 * row] = is_valid ? largest : 0;
  e.sums[2 * row + 1] = is_valid ? sum : INFINITY;
  e.entropies[row] = is_valid ? logf(sum) - weighted / sum : 0;
}

// One block processes one row: it replaces logits by their gradients p (slope - sum of p slope - grad (log p +
// entropy)), where a slope is the gradient of a mean times *share.
__global__ void __launch_bounds__(THREADS) grad_entropy_kernel(
    Entropies e, const float* grad_entropies, const float* grad_means, const float* share, int64_t begin,
    float* logits) {
  const int64_t row = begin + blockIdx.x;
  float* const own = logits + (int64_t)blockIdx.x * e.codes;
  __shared__ float of_warps[WARP];
  const float largest = e.sums[2 * row], sum = e.sums[2 * row + 1], grad = grad_entropies[row];
  const bool is_valid = e.valid == nullptr || e.valid[row];
  float expected = 0;
  for (int64_t i = threadIdx.x; i < e.codes; i += THREADS) expected += expf(own[i] - largest) * grad_means[i];
  expected = block_reduce(expected, Sum{}, of_warps) * *share / sum;
  const float offset = is_valid ? expected + grad * (e.entropies[row] - logf(sum)) : 0;
  for (int64_t i = threadIdx.x; i < e.codes; i += THREADS) {
    const float shifted = own[i] - largest, logarithm = shifted < LEAST_LOGARITHM ? LEAST_LOGARITHM : shifted;
    own[i] = is_valid ? expf(shifted) / sum * (grad_means[i] * *share - offset - grad * logarithm) : 0;
  }
}

// One block processes one code: the gradient of the codebook from those of weight and bias.
__global__ void __launch_bounds__(THREADS)
    grad_codebook_kernel(Rows codes, float per_temperature, const float* grad_bias, float* grad) {
  const int64_t offset = row_offset(codes, blockIdx.x);
  for (int64_t d = threadIdx.x; d < codes.features; d += THREADS) {
    float& to = grad[blockIdx.x * codes.features + d];
    to = 2 * per_temperature * (to - grad_bias[blockIdx.x] * load_element(codes, offset + d * codes.stride));
  }
}

// The vectors, with zeros for those that are not valid, weight and bias of the logits.
struct Inputs {
  Inputs(const Tensor& x, const Tensor& codebook, double temperature, const OptionalTensor& mask, const Device& device)
      : codes(codes_of("codebook", codebook, rows_of("x", x))),
        per_temperature((float)(1 / temperature)),
        weight(new_tensor(x, {codes.count, codes.features})),
        bias(new_tensor(x, {codes.count})),
        share(new_tensor(x, {1})),
        vectors(x) {
    const Rows rows = rows_of("x", x);
    if (mask.has_value()) {
      check_device("mask", *mask);
      STD_TORCH_CHECK(
          mask->scalar_type() == ScalarType::Bool && mask->numel() == rows.count, "expected mask of dtype bool with ",
          rows.count, " elements, got ", shape_text(*mask));
      mask_ = torch::stable::contiguous(*mask);
      valid = data_of<const bool>(mask_);
      vectors = new_tensor(x, shape_of(x));
      launch(
          "valid", valid_kernel, blocks(rows.count), THREADS, 0, device.stream, rows, valid, data_of<float>(vectors));
    }
    launch("share", share_kernel, 1, THREADS, 0, device.stream, valid, rows.count, data_of<float>(share));
    launch(
        "weight", weight_kernel, blocks(codes.count), THREADS, 0, device.stream, codes, per_temperature,
        data_of<float>(weight), data_of<float>(bias));
  }
  const Rows codes;
  const float per_temperature;
  const Tensor weight, bias, share;  // share: 1 / number of valid vectors
  Tensor vectors;
  const bool* valid = nullptr;

 private:
  Tensor mask_;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> code_entropy_fwd(
    const Tensor& x, const Tensor& codebook, double temperature, OptionalTensor mask) {
  const Device device(x);
  const Inputs inputs(x, codebook, temperature, mask, device);
  const Logits logits(inputs.vectors, inputs.weight, inputs.bias, device);
  const Tensor entropies = new_tensor(x, shape_with(x, {})), sums = new_tensor(x, shape_with(x, {2}));
  const Tensor means = new_zeroed(x, {inputs.codes.count});
  const Entropies e{inputs.valid, inputs.codes.count, data_of<float>(sums), data_of<float>(entropies)};
  logits.for_chunks([&](int64_t begin, int64_t count, float* data) {
    launch("entropy", entropy_kernel, blocks(count), THREADS, 0, device.stream, e, begin, data);
    add_columns(data, count, e.codes, data_of<float>(means), device);
  });
  launch(
      "scale", scale_kernel, blocks(ceil_div(e.codes, THREADS)), THREADS, 0, device.stream, data_of<float>(means),
      e.codes, data_of<float>(inputs.share));
  return {entropies, sums, means};
}

std::tuple<Tensor, Tensor> code_entropy_bwd(
    const Tensor& grad_entropies, const Tensor& grad_mean_probabilities, const Tensor& x, const Tensor& codebook,
    const Tensor& sums, const Tensor& entropies, double temperature, OptionalTensor mask, bool need_x,
    bool need_codebook) {
  const Device device(x);
  const Inputs inputs(x, codebook, temperature, mask, device);
  const Logits logits(inputs.vectors, inputs.weight, inputs.bias, device);
  STD_TORCH_CHECK(
      grad_entropies.numel() == logits.rows.count && entropies.numel() == logits.rows.count &&
          sums.numel() == 2 * logits.rows.count && grad_mean_probabilities.numel() == inputs.codes.count,
      "expected grad_entropies and entropies of shape [...], sums of shape [..., 2] and grad_mean_probabilities of "
      "shape [K], got ",
      shape_text(grad_entropies), ", ", shape_text(entropies), ", ", shape_text(sums), " and ",
      shape_text(grad_mean_probabilities));
  const Tensor grads = torch::stable::contiguous(grad_entropies), own = torch::stable::contiguous(entropies);
  const Tensor saved = torch::stable::contiguous(sums);
  const Tensor grad_means = torch::stable::contiguous(grad_mean_probabilities);
  const Entropies e{inputs.valid, inputs.codes.count, data_of<float>(saved), data_of<float>(own)};
  LogitGradients gradients(inputs.vectors, inputs.weight, logits, need_x, need_codebook, device);
  const Tensor grad_bias = new_zeroed(x, {need_codebook ? e.codes : 0});
  logits.for_chunks([&](int64_t begin, int64_t count, float* data) {
    launch(
        "grad_entropy", grad_entropy_kernel, blocks(count), THREADS, 0, device.stream, e, data_of<float>(grads),
        data_of<float>(grad_means), data_of<float>(inputs.share), begin, data);
    gradients.add(begin, count, data);
    if (need_codebook) add_columns(data, count, e.codes, data_of<float>(grad_bias), device);
  });
  if (need_codebook)
    launch(
        "grad_codebook", grad_codebook_kernel, blocks(e.codes), THREADS, 0, device.stream, inputs.codes,
        inputs.per_temperature, data_of<float>(grad_bias), data_of<float>(gradients.grad_weight));
  return {gradients.grad_x, gradients.grad_weight};
}

}  // namespace dlvae
