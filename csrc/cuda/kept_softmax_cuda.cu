// softmax(x W^T + b) at the kept codes, and its gradients. Logits are computed for a chunk of rows at a time.
#include "../operations.h"
#include "launch.h"
#include "parts.cuh"
#include "products.h"
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

__global__ void bias_kernel(Rows bias, float* to) {
  const int64_t code = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (code < bias.features) to[code] = load_element(bias, code * bias.stride);
}

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

// One block processes 32 codes: it adds the sums over rows to the previous ones, in the same order at each run.
__global__ void __launch_bounds__(THREADS)
    grad_bias_kernel(const float* logits, int64_t rows, int64_t codes, float* bias) {
  __shared__ float of_warps[THREADS / 32][32];
  const int64_t code = blockIdx.x * 32 + lane_index();
  float sum = 0;
  for (int64_t row = warp_index(); code < codes && row < rows; row += THREADS / 32) sum += logits[row * codes + code];
  of_warps[warp_index()][lane_index()] = sum;
  __syncthreads();
  if (warp_index() > 0 || code >= codes) return;
  for (int w = 1; w < THREADS / 32; ++w) sum += of_warps[w][lane_index()];
  bias[code] += sum;
}

// The logits of rows, a chunk of rows at a time.
class Logits {
 public:
  Logits(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Device& device)
      : like_(x),
        device_(device),
        rows(rows_of("x", x)),
        codes(codes_of("weight", weight, rows)),
        packed_(pack_codes(x, codes, arithmetic_of(rows, codes), device)),
        chunk_(rows_of_chunk(std::max(rows.features, codes.count), device)),
        data_(new_tensor(x, {std::min(chunk_, rows.count), codes.count})),
        bias_(new_tensor(x, {bias.has_value() ? codes.count : 0})) {
    if (!bias.has_value()) return;
    const Rows column = rows_of("bias", *bias);
    STD_TORCH_CHECK(
        column.features == codes.count && column.count == 1, "expected bias of shape [K] = [", codes.count, "], got ",
        shape_text(*bias));
    launch(
        "bias", bias_kernel, blocks(ceil_div(codes.count, THREADS)), THREADS, 0, device.stream, column,
        data_of<float>(bias_));
  }

  // Calls f(begin, count, logits [count, K]) for all rows in order.
  template <class F>
  void for_chunks(const F& f) const {
    float* const out = data_of<float>(data_);
    const Affine affine{bias_.numel() > 0 ? data_of<float>(bias_) : nullptr, 1, false, false};
    for (int64_t begin = 0; begin < rows.count; begin += chunk_) {
      const int64_t end = std::min(begin + chunk_, rows.count);
      const PackedRows part = products(like_, rows, begin, end, packed_, affine, out, codes.count, device_);
      repair_products(rows, begin, part, codes, packed_, affine, out, codes.count, device_);
      f(begin, end - begin, out);
    }
  }

 private:
  Tensor like_;
  const Device& device_;

 public:
  const Rows rows, codes;

 private:
  PackedCodes packed_;
  int64_t chunk_;
  Tensor data_, bias_;
};

// Returns the columns of a matrix [count, features] with the given strides as rows.
Rows columns_of(const void* data, Type type, int64_t count, int64_t features, int64_t row_stride, int64_t stride) {
  return {const_cast<void*>(data), type, features, count, row_stride, 1, {features}, {stride}};
}

// out = a b^T, or out += a b^T.
void multiply(
    const Tensor& like, const Rows& a, const Rows& b, const PackedCodes& packed, bool adds, float* out, int64_t ld,
    const Device& device) {
  const Affine affine{nullptr, 1, false, adds};
  const PackedRows rows = products(like, a, 0, a.count, packed, affine, out, ld, device);
  repair_products(a, 0, rows, b, packed, affine, out, ld, device);
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
  const std::vector<int64_t> none{0};
  const Tensor grad_x = new_tensor(x, need_x ? shape_of(x) : none);
  const Tensor grad_weight = new_zeroed(x, need_weight ? shape_of(weight) : none);
  const Tensor grad_bias = new_zeroed(x, {need_bias ? codes.count : 0});
  const Rows atoms = columns_of(codes.data, codes.type, codes.count, codes.features, codes.strides[0], codes.stride);
  std::optional<PackedCodes> packed_atoms;
  if (need_x) packed_atoms = pack_codes(x, atoms, Arithmetic::split, device);
  logits.for_chunks([&](int64_t begin, int64_t count, float* data) {
    launch(
        "grad_logits", grad_logits_kernel, blocks(count), THREADS, 0, device.stream, kept, data_of<float>(of_values),
        begin, data);
    if (need_x) {
      const Rows slopes{data, Type::float32, count, codes.count, 1, 1, {count}, {codes.count}};
      multiply(
          x, slopes, atoms, *packed_atoms, false, data_of<float>(grad_x) + begin * rows.features, rows.features,
          device);
    }
    if (need_weight) {
      const Tensor part = rows_in_float32(x, rows, begin, begin + count, device);
      const Rows slopes = columns_of(data, Type::float32, count, codes.count, codes.count, 1);
      const Rows features = columns_of(part.data_ptr(), Type::float32, count, rows.features, rows.features, 1);
      const PackedCodes packed = pack_codes(x, features, Arithmetic::split, device);
      multiply(x, slopes, features, packed, true, data_of<float>(grad_weight), rows.features, device);
    }
    if (need_bias)
      launch(
          "grad_bias", grad_bias_kernel, blocks(ceil_div(codes.count, WARP)), THREADS, 0, device.stream, data, count,
          codes.count, data_of<float>(grad_bias));
  });
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace dlvae
