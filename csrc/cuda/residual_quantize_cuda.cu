#include "../operations.h"
#include "../rotation.h"
#include "launch.h"
#include "rows_cuda.cuh"
#include "search_cuda.h"
#include "segment_sum_cuda.h"

namespace dlvae {
namespace {

// A warp processes a row. Each lane has the same features of all tensors, so that no lane reads what another wrote.
constexpr int THREADS = 256;
unsigned blocks_of(int64_t rows) { return blocks(ceil_div(rows, THREADS / WARP)); }
__device__ int64_t row_of_warp() { return (int64_t)blockIdx.x * (THREADS / WARP) + warp_index(); }

// Subtracts the nearest codes of one level from the residuals [N, D] and adds them to the sums [N, D]. Writes the
// indices, -1 for a row without a code, the counts of the level, and the sum of squared errors of each block.
__global__ void __launch_bounds__(THREADS) subtract_kernel(
    Rows codes, int64_t rows, const int64_t* nearest, const bool* runs, const bool* mask, float* residuals, float* sums,
    int64_t* indices, int64_t num_levels, unsigned long long* counts, double* losses) {
  __shared__ double of_warps[WARP];
  const int64_t row = row_of_warp();
  double loss = 0;
  if (row < rows) {
    const bool has_code = (runs == nullptr || *runs) && (mask == nullptr || mask[row]);
    if (lane_index() == 0) {
      indices[row * num_levels] = has_code ? nearest[row] : -1;
      if (has_code) atomicAdd(counts + nearest[row], 1ull);
    }
    const int64_t first = row * codes.features, at = has_code ? row_offset(codes, nearest[row]) : 0;
    for (int64_t d = lane_index(); has_code && d < codes.features; d += WARP) {
      const float code = load_element(codes, at + d * codes.stride), error = residuals[first + d] - code;
      residuals[first + d] = error;
      sums[first + d] += code;
      loss += (double)error * error;
    }
  }
  loss = block_reduce(loss, Sum{}, of_warps);
  if (threadIdx.x == 0) losses[blockIdx.x] = loss;
}

// One block for each level computes the mean over the elements of valid rows in a fixed order.
__global__ void __launch_bounds__(1024) means_kernel(
    const double* losses, int64_t count, const bool* mask, int64_t rows, int64_t features, float* codebook_loss,
    float* commitment_loss) {
  __shared__ double of_warps[WARP];
  double sum = 0, valid = 0;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) sum += losses[blockIdx.x * count + i];
  for (int64_t row = threadIdx.x; row < rows; row += blockDim.x) valid += mask == nullptr || mask[row] ? 1 : 0;
  sum = block_reduce(sum, Sum{}, of_warps);
  valid = block_reduce(valid, Sum{}, of_warps);
  if (threadIdx.x == 0) {
    codebook_loss[blockIdx.x] = commitment_loss[blockIdx.x] = (float)(sum / (valid > 0 ? valid * features : 1));
  }
}

// Writes rows of float32 in the type and with the strides of `to`.
__global__ void __launch_bounds__(RowBlock::THREADS) store_kernel(Rows rows, Rows to) {
  __shared__ int64_t offsets[2][RowBlock::ROWS];
  __shared__ RowBlock::Tile tile;
  const int64_t first = (int64_t)blockIdx.x * RowBlock::ROWS;
  const RowBlock from_block(rows, first, rows.count, offsets[0]), to_block(to, first, rows.count, offsets[1]);
  for (int64_t feature = 0; feature < rows.features; feature += RowBlock::FEATURES) {
    __syncthreads();
    from_block.load(feature, tile);
    __syncthreads();
    to_block.store(feature, tile);
  }
}

// The codes that the rows have at each level.
struct Assigned {
  Rows codebooks;          // L * K codes
  const int64_t* indices;  // [N, L]
  int64_t levels, num_codes;

  // Returns the number of the code among the codes of all levels, or -1.
  __device__ int64_t code(int64_t row, int64_t level) const {
    const int64_t index = indices[row * levels + level];
    return index >= 0 && index < num_codes ? level * num_codes + index : -1;
  }
  // Returns the offset of a code; feature d of the code at an offset.
  __device__ int64_t offset(int64_t code) const { return row_offset(codebooks, code); }
  __device__ float element(int64_t at, int64_t d) const { return load_element(codebooks, at + d * codebooks.stride); }
};

// Writes for each level what it quantizes, [L, N, D], and the code [L, N] of each row, -1 also for one that is not
// finite. With `weights`, writes instead the errors of the codes times slope * weights[level], and keeps those codes.
// residuals: [N, D], x at the start.
__global__ void __launch_bounds__(THREADS) levels_kernel(
    Assigned assigned, int64_t rows, float* residuals, const float* weights, float slope, float* out, int64_t* codes) {
  const int64_t row = row_of_warp(), features = assigned.codebooks.features;
  if (row >= rows) return;
  float* const residual = residuals + row * features;
  for (int64_t level = 0; level < assigned.levels; ++level) {
    const int64_t code = assigned.code(row, level), place = level * rows + row;
    const int64_t at = code < 0 ? 0 : assigned.offset(code);
    const float factor = weights == nullptr ? 1 : weights[level] * slope;
    int is_left_out = 0;
    for (int64_t d = lane_index(); d < features; d += WARP) {
      const float value = residual[d], rest = code < 0 ? value : value - assigned.element(at, d);
      out[place * features + d] = weights == nullptr ? value : -rest * factor;
      is_left_out |= weights == nullptr && !(value - value == 0);
      residual[d] = rest;
    }
    is_left_out = warp_reduce(is_left_out, Greatest{});
    if (lane_index() == 0) codes[place] = is_left_out ? -1 : code;
  }
}

// Sums of the rows that `levels_kernel` writes by code, [L * K, ld].
void sum_levels(
    const Tensor& x, const Assigned& assigned, const float* weights, float slope, const Tensor& sums, bool counts,
    const Device& device) {
  const Rows rows = rows_of("x", x);
  const Tensor residuals = rows_in_float32(x, rows, 0, rows.count, device);
  const Tensor out = new_tensor(x, {assigned.levels * rows.count, rows.features});
  const Tensor codes = new_tensor(x, {assigned.levels * rows.count}, ScalarType::Long);
  launch(
      "levels", levels_kernel, blocks_of(rows.count), THREADS, 0, device.stream, assigned, rows.count,
      data_of<float>(residuals), weights, slope, data_of<float>(out), data_of<int64_t>(codes));
  const int64_t ld = sums.size(-1);
  const SortedPairs pairs(
      x, {data_of<int64_t>(codes), codes.numel(), 1, assigned.levels * assigned.num_codes, nullptr, nullptr}, device);
  pairs.sum(x, rows_of("out", out), nullptr, data_of<float>(sums), ld, device);
  if (counts) pairs.count(data_of<float>(sums) + rows.features, ld, device);
}

enum class Gradient { once, each, rotation, rotation_each };

// Calls write(d, value) with the gradient of the rotation trick for each feature of one row. source(d) and target(d) are
// the features of x and q.
template <class Source, class Target, class Write>
__device__ void rotate(
    const float* grad, int64_t features, const Source& source, const Target& target, const Write& write) {
  const auto sum = [](float value) { return warp_reduce(value, Sum{}); };
  float x_squares = 0, q_squares = 0, s_squares = 0, grad_s = 0, grad_t = 0;
  for (int64_t d = lane_index(); d < features; d += WARP) {
    x_squares += source(d) * source(d);
    q_squares += target(d) * target(d);
  }
  Rotation rotation(sum(x_squares), sum(q_squares));
  for (int64_t d = lane_index(); d < features; d += WARP) {
    const float t = target(d), s = rotation.s(source(d), t);
    s_squares += s * s;
    grad_s += grad[d] * s;
    grad_t += grad[d] * (t * rotation.per_q);
  }
  rotation.set_products(sum(s_squares), sum(grad_s), sum(grad_t));
  for (int64_t d = lane_index(); d < features; d += WARP) write(d, rotation(grad[d], source(d), target(d)));
}

// Writes the gradient of x to `totals` [N, D], zeros at the start. residuals: [N, D], x at the start; weights: the
// gradients of the commitment losses.
template <Gradient GRADIENT>
__global__ void __launch_bounds__(THREADS, 2) grad_x_kernel(
    const float* grads, Assigned assigned, int64_t rows, const float* weights, float slope, float* residuals,
    float* totals) {
  const int64_t row = row_of_warp(), features = assigned.codebooks.features;
  if (row >= rows) return;
  const float* const grad = grads + row * features;
  float *const residual = residuals + row * features, *const total = totals + row * features;
  const auto source = [&](int64_t d) { return residual[d]; };
  // Calls f(level, offset of the code) for each level that has a code.
  const auto for_levels = [&](const auto& f) {
    for (int64_t level = 0; level < assigned.levels; ++level) {
      const int64_t code = assigned.code(row, level);
      if (code >= 0) f(level, assigned.offset(code));
    }
  };
  if (GRADIENT == Gradient::rotation) {
    int ran = 0;
    for_levels([&](int64_t, int64_t at) {
      ++ran;
      for (int64_t d = lane_index(); d < features; d += WARP) total[d] += assigned.element(at, d);
    });
    const auto quantized = [&](int64_t d) { return total[d]; };
    if (ran > 0) rotate(grad, features, source, quantized, [&](int64_t d, float value) { total[d] = value; });
  }
  int times = 0;
  for_levels([&](int64_t level, int64_t at) {
    if (GRADIENT == Gradient::each || (GRADIENT == Gradient::once && times == 0)) ++times;
    if (GRADIENT == Gradient::rotation_each) {
      const auto code = [&](int64_t d) { return assigned.element(at, d); };
      rotate(grad, features, source, code, [&](int64_t d, float value) { total[d] += value; });
    }
    const float factor = weights[level] * slope;
    for (int64_t d = lane_index(); d < features; d += WARP) {
      residual[d] -= assigned.element(at, d);
      total[d] += residual[d] * factor;
    }
  });
  for (int64_t d = lane_index(); times > 0 && d < features; d += WARP) total[d] += grad[d] * (float)times;
}

// Calls f with the gradient of a name as a constant.
template <class F>
void with_gradient(const std::string& name, const F& f) {
  if (name == "each") return f(std::integral_constant<Gradient, Gradient::each>{});
  if (name == "rotation") return f(std::integral_constant<Gradient, Gradient::rotation>{});
  if (name == "rotation_each") return f(std::integral_constant<Gradient, Gradient::rotation_each>{});
  f(std::integral_constant<Gradient, Gradient::once>{});
}

void check_codebooks(const Tensor& codebooks, const Rows& x) {
  STD_TORCH_CHECK(
      codebooks.dim() == 3 && codebooks.size(1) >= 1 && codebooks.size(2) == x.features,
      "expected codebooks of shape [L, K, D] with D = ", x.features, " features as in x, got ", shape_text(codebooks));
}

Rows codes_of_level(const Tensor& codebooks, int64_t level) {
  Rows codes = rows_of("codebooks", codebooks);
  codes.data = static_cast<char*>(codes.data) + level * codebooks.stride(0) * codebooks.element_size();
  codes.count = codebooks.size(1);
  codes.dims = 1;
  codes.sizes[0] = codes.count;
  codes.strides[0] = codebooks.stride(1);
  return codes;
}

Assigned assigned_of(const Tensor& codebooks, const Tensor& indices, const Rows& x) {
  check_codebooks(codebooks, x);
  STD_TORCH_CHECK(
      indices.numel() == x.count * codebooks.size(0), "expected one index for each of the ", x.count,
      " vectors of x and ", codebooks.size(0), " levels, got ", indices.numel());
  return {rows_of("codebooks", codebooks), data_of<int64_t>(indices), codebooks.size(0), codebooks.size(1)};
}

// Returns the numbers of a float32 tensor [L], adjacent in memory.
Tensor weights_of(const char* name, const Tensor& tensor, int64_t levels) {
  check_device(name, tensor);
  STD_TORCH_CHECK(
      tensor.numel() == levels && tensor.scalar_type() == ScalarType::Float, "expected ", name, " of ", levels,
      " float32 numbers, got shape ", shape_text(tensor), " and dtype ",
      torch::headeronly::toString(tensor.scalar_type()));
  return torch::stable::contiguous(tensor);
}

OptionalTensor flags_of(const OptionalTensor& flags) {
  return flags.has_value() ? OptionalTensor(torch::stable::contiguous(*flags)) : std::nullopt;
}
const bool* pointer_of(const OptionalTensor& flags) { return flags.has_value() ? data_of<bool>(*flags) : nullptr; }

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> residual_quantize_fwd(
    const Tensor& x, const Tensor& codebooks, OptionalTensor levels, OptionalTensor mask, std::string precision,
    std::string gradient) {
  const Device device(x);
  const Rows rows = rows_of("x", x);
  check_codebooks(codebooks, rows);
  const int64_t num_levels = codebooks.size(0), num_codes = codebooks.size(1);
  const OptionalTensor of_levels = flags_of(levels), of_rows = flags_of(mask);
  const bool *const runs = pointer_of(of_levels), *const valid = pointer_of(of_rows);
  const Tensor indices = new_tensor(x, shape_with(x, {num_levels}), ScalarType::Long);
  const Tensor counts = new_zeroed(x, {num_levels, num_codes}, ScalarType::Long);
  const Tensor codebook_loss = new_tensor(x, {num_levels}), commitment_loss = new_tensor(x, {num_levels});
  const Tensor residuals = rows_in_float32(x, rows, 0, rows.count, device);
  const Tensor sums = new_zeroed(x, {rows.count, rows.features});
  const Tensor nearest = new_tensor(x, {rows.count}, ScalarType::Long);
  const unsigned parts = blocks_of(rows.count);
  const Tensor losses = new_tensor(x, {num_levels, parts}, ScalarType::Double);
  for (int64_t level = 0; level < num_levels; ++level) {
    const Rows codes = codes_of_level(codebooks, level);
    search(residuals, rows_of("residuals", residuals), codes, data_of<int64_t>(nearest), device);
    launch(
        "subtract", subtract_kernel, parts, THREADS, 0, device.stream, codes, rows.count, data_of<int64_t>(nearest),
        runs == nullptr ? nullptr : runs + level, valid, data_of<float>(residuals), data_of<float>(sums),
        data_of<int64_t>(indices) + level, num_levels,
        reinterpret_cast<unsigned long long*>(data_of<int64_t>(counts) + level * num_codes),
        data_of<double>(losses) + level * parts);
  }
  launch(
      "means", means_kernel, blocks(num_levels), 1024, 0, device.stream, data_of<double>(losses), parts, valid,
      rows.count, rows.features, data_of<float>(codebook_loss), data_of<float>(commitment_loss));
  const Tensor quantized = new_like(x);
  launch(
      "store", store_kernel, RowBlock::blocks_of(rows.count), RowBlock::THREADS, 0, device.stream,
      rows_of("sums", sums), rows_of("quantized", quantized));
  return {quantized, indices, codebook_loss, commitment_loss, counts};
}

std::tuple<Tensor, Tensor> residual_quantize_bwd(
    const Tensor& grad_quantized, const Tensor& grad_codebook_loss, const Tensor& grad_commitment_loss, const Tensor& x,
    const Tensor& indices, const Tensor& codebooks, std::string gradient, bool need_x, bool need_codebooks) {
  const Device device(x);
  const Rows rows = rows_of("x", x);
  const Tensor which = indices_of("indices", indices);
  const Assigned assigned = assigned_of(codebooks, which, rows);
  STD_TORCH_CHECK(
      shape_of(grad_quantized) == shape_of(x), "expected grad_quantized of the shape of x, ", shape_text(x), ", got ",
      shape_text(grad_quantized));
  // d mean((c - r)^2) / d r, before the gradient of either loss is multiplied in.
  const float slope = (float)(2.0 / std::max<int64_t>(1, x.numel()));
  const Tensor grad_x = need_x ? new_like(x) : new_tensor(x, {0});
  if (need_x) {
    const Tensor grads = in_float32("grad_quantized", grad_quantized, device);
    const Tensor residuals = rows_in_float32(x, rows, 0, rows.count, device);
    const Tensor totals = new_zeroed(x, {rows.count, rows.features});
    const Tensor weights = weights_of("grad_commitment_loss", grad_commitment_loss, assigned.levels);
    with_gradient(gradient, [&](auto constant) {
      launch(
          "grad_x", grad_x_kernel<decltype(constant)::value>, blocks_of(rows.count), THREADS, 0, device.stream,
          data_of<float>(grads), assigned, rows.count, data_of<float>(weights), slope, data_of<float>(residuals),
          data_of<float>(totals));
    });
    launch(
        "store", store_kernel, RowBlock::blocks_of(rows.count), RowBlock::THREADS, 0, device.stream,
        rows_of("totals", totals), rows_of("grad_x", grad_x));
  }
  const Tensor grad_codebooks = new_tensor(x, need_codebooks ? shape_of(codebooks) : std::vector<int64_t>{0});
  if (need_codebooks) {
    const Tensor weights = weights_of("grad_codebook_loss", grad_codebook_loss, assigned.levels);
    sum_levels(x, assigned, data_of<float>(weights), slope, grad_codebooks, false, device);
  }
  return {grad_x, grad_codebooks};
}

Tensor residual_statistics(const Tensor& x, const Tensor& indices, const Tensor& codebooks) {
  const Device device(x);
  const Rows rows = rows_of("x", x);
  const Tensor which = indices_of("indices", indices);
  const Assigned assigned = assigned_of(codebooks, which, rows);
  const Tensor statistics = new_tensor(x, {assigned.levels, assigned.num_codes, rows.features + 1});
  sum_levels(x, assigned, nullptr, 0, statistics, true, device);
  return statistics;
}

}  // namespace dlvae
