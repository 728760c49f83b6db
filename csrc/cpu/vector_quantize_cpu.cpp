// Search, codes, losses and counts in one pass over x; and their gradients.
#include "flags.h"
#include "operations_cpu.h"
#include "packed_codebook.h"
#include "segment_sum_cpu.h"

namespace dlvae {
namespace {

float scalar_of(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.numel() == 1, "expected ", name, " to be one number, got shape ", shape_text(tensor));
  float value;
  kernels().load_rows(rows_of(name, torch::stable::unsqueeze(tensor, -1)), 0, 1, &value, 1);
  return value;
}

// Returns the dimensions of a tensor from the largest stride to the smallest, so that the last one has adjacent
// elements.
std::vector<int64_t> memory_order(const Tensor& tensor) {
  std::vector<int64_t> order(tensor.dim());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    const auto rank = [&](int64_t i) { return tensor.size(i) == 1 ? INT64_MAX : tensor.stride(i); };
    return rank(a) > rank(b);
  });
  return order;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> vector_quantize_fwd(
    const Tensor& x, const Tensor& codebook, bool need_error, std::string precision, OptionalTensor mask) {
  const Kernels& k = kernels();
  const Heads heads(k, x, codebook);
  const Flags is_valid("mask", mask, shape_with(x, {}));
  const Tensor quantized = new_like(x);
  const Tensor half_error = need_error ? new_like(x) : new_tensor(x, {0}, x.scalar_type());
  const Tensor indices = new_tensor(x, shape_with(x, {}), ScalarType::Long);
  const Tensor counts = new_tensor(x, shape_with(codebook, {}), ScalarType::Long);
  const Tensor codebook_loss = new_tensor(x, {}), commitment_loss = new_tensor(x, {});
  int64_t* index = data_of<int64_t>(indices);
  int64_t* count = data_of<int64_t>(counts);
  const int64_t blocks = heads.num_blocks();
  const Array<double> losses = new_array<double>(heads.count() * blocks);
  heads.for_rows([&](int64_t head, int64_t begin, int64_t end) {
    const Rows errors = need_error ? heads.rows("half_error", half_error, head) : Rows{};
    k.quantize_rows(
        heads.book(head), heads.rows("x", x, head), begin, end, heads.count(), index + head,
        is_valid.data() == nullptr ? nullptr : is_valid.data() + head, heads.rows("quantized", quantized, head), errors,
        losses.get() + head * blocks);
  });
  // The order of the sum does not depend on the number of threads.
  double loss = 0;
  for (int64_t b = 0; b < heads.count() * blocks; ++b) loss += losses[b];
  const int64_t num_codes = codebook.size(codebook.dim() - 2);
  std::fill(count, count + counts.numel(), 0);
  int64_t num_valid = 0;
  for (int64_t r = 0; r < heads.num_rows(); ++r)
    for (int64_t head = 0; head < heads.count(); ++head) {
      const int64_t code = index[r * heads.count() + head];
      if (code < 0) continue;
      ++count[head * num_codes + code];
      ++num_valid;
    }
  loss /= static_cast<double>(std::max<int64_t>(1, num_valid * x.size(x.dim() - 1)));
  for (const Tensor& each : {codebook_loss, commitment_loss}) *data_of<float>(each) = static_cast<float>(loss);
  return {quantized, indices, codebook_loss, commitment_loss, counts, half_error};
}

std::tuple<Tensor, Tensor> vector_quantize_bwd(
    const Tensor& grad_quantized, const Tensor& grad_codebook_loss, const Tensor& grad_commitment_loss,
    const Tensor& half_error, const Tensor& indices, int64_t num_codes, int64_t num_heads, bool need_x,
    bool need_codebook) {
  const Rows rows = rows_of("half_error", half_error);
  const Indices codes("indices", indices, "half_error", rows);
  check_codes(num_codes, num_heads, rows);
  // d mean((q - x)^2) / d q = slope * half_error, before the gradient of either loss is multiplied in.
  const double slope = 4.0 / static_cast<double>(std::max<int64_t>(1, half_error.numel()));
  Tensor grad_x = new_tensor(half_error, {0});
  Tensor grad_codebook = new_tensor(half_error, {0});
  if (need_codebook) {
    grad_codebook = new_tensor(half_error, {num_heads * num_codes, rows.features});
    const SortedPairs pairs(codes, 1, num_codes, num_heads, nullptr, nullptr);
    const float weight = static_cast<float>(slope * scalar_of("grad_codebook_loss", grad_codebook_loss));
    segment_sum(rows, pairs, 1, weight, data_of<float>(grad_codebook), rows.features);
  }
  if (need_x) {
    check_device("grad_quantized", grad_quantized);
    STD_TORCH_CHECK(
        shape_of(grad_quantized) == shape_of(half_error), "expected grad_quantized of the shape of half_error, ",
        shape_text(half_error), ", got ", shape_text(grad_quantized));
    grad_x = new_like(half_error);
    const std::vector<int64_t> order = memory_order(half_error);
    const Rows from = rows_of("grad_quantized", grad_quantized, order), less = rows_of("half_error", half_error, order);
    const Rows out = rows_of("grad_x", grad_x, order);
    const float scale = static_cast<float>(slope * scalar_of("grad_commitment_loss", grad_commitment_loss));
    const Kernels& k = kernels();
    parallel(out.count, 1 + 32768 / std::max<int64_t>(1, out.features), [&](int64_t begin, int64_t end) {
      k.subtract_scaled(from, less, scale, out, begin, end);
    });
    // A vector without a code has no gradient.
    const Rows vectors = rows_of("grad_x", grad_x);
    const Array<float> zeros = new_array<float>(rows.features);
    std::fill(zeros.get(), zeros.get() + rows.features, 0.0f);
    parallel(codes.count, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        if (codes.data[r] < 0) k.store_rows(vectors, r, r + 1, zeros.get(), rows.features);
    });
  }
  return {grad_x, grad_codebook};
}

}  // namespace dlvae
