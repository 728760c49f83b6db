#include "logits.h"

#include "rows_cuda.cuh"

namespace dlvae {
namespace {

constexpr int THREADS = 256;

__global__ void bias_kernel(Rows bias, float* to) {
  const int64_t code = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (code < bias.features) to[code] = load_element(bias, code * bias.stride);
}

// One block processes 32 columns: it adds the sums over rows to the previous ones, in the same order at each run.
__global__ void __launch_bounds__(THREADS)
    columns_kernel(const float* values, int64_t rows, int64_t columns, float* sums) {
  __shared__ float of_warps[THREADS / 32][32];
  const int64_t column = blockIdx.x * 32 + lane_index();
  float sum = 0;
  for (int64_t row = warp_index(); column < columns && row < rows; row += THREADS / 32)
    sum += values[row * columns + column];
  of_warps[warp_index()][lane_index()] = sum;
  __syncthreads();
  if (warp_index() > 0 || column >= columns) return;
  for (int w = 1; w < THREADS / 32; ++w) sum += of_warps[w][lane_index()];
  sums[column] += sum;
}

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

}  // namespace

Logits::Logits(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Device& device)
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

LogitGradients::LogitGradients(
    const Tensor& x, const Tensor& weight, const Logits& logits, bool need_x, bool need_weight, const Device& device)
    : grad_x(new_tensor(x, need_x ? shape_of(x) : std::vector<int64_t>{0})),
      grad_weight(new_zeroed(x, need_weight ? shape_of(weight) : std::vector<int64_t>{0})),
      like_(x),
      logits_(logits),
      device_(device),
      need_x_(need_x),
      need_weight_(need_weight),
      atoms_(columns_of(
          logits.codes.data, logits.codes.type, logits.codes.count, logits.codes.features, logits.codes.strides[0],
          logits.codes.stride)) {
  if (need_x) packed_atoms_ = pack_codes(x, atoms_, Arithmetic::split, device);
}

void LogitGradients::add(int64_t begin, int64_t count, float* logits) {
  const int64_t codes = logits_.codes.count, features = logits_.rows.features;
  if (need_x_) {
    const Rows slopes{logits, Type::float32, count, codes, 1, 1, {count}, {codes}};
    multiply(
        like_, slopes, atoms_, *packed_atoms_, false, data_of<float>(grad_x) + begin * features, features, device_);
  }
  if (need_weight_) {
    const Tensor part = rows_in_float32(like_, logits_.rows, begin, begin + count, device_);
    const Rows slopes = columns_of(logits, Type::float32, count, codes, codes, 1);
    const Rows vectors = columns_of(part.data_ptr(), Type::float32, count, features, features, 1);
    const PackedCodes packed = pack_codes(like_, vectors, Arithmetic::split, device_);
    multiply(like_, slopes, vectors, packed, true, data_of<float>(grad_weight), features, device_);
  }
}

void add_columns(const float* values, int64_t rows, int64_t columns, float* sums, const Device& device) {
  launch(
      "columns", columns_kernel, blocks(ceil_div(columns, WARP)), THREADS, 0, device.stream, values, rows, columns,
      sums);
}

}  // namespace dlvae
