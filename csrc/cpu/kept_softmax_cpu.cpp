#include <limits>
#include <optional>
#include <tuple>

#include "operations_cpu.h"

namespace dlvae {
namespace {

// The backward pass holds this many bytes of the gradient of the logits at once. If K is large, the smallest superblock
// of rows may take more.
constexpr int64_t SUPERBLOCK_BYTES = 8 << 20;
constexpr int64_t SMALLEST_SUPERBLOCK = 256;

// Converts x, weight, bias and indices to the form that the kernels read, and owns the copies.
class Inputs {
 public:
  KeptSoftmax s{};
  Matrix weight;

  Inputs(const Tensor& x, const Tensor& weights, const std::optional<Tensor>& bias, const Tensor& indices)
      : weight("weight", checked(weights)), indices_(torch::stable::contiguous(indices)) {
    const Kernels& all = kernels();
    s.x = rows_of("x", x);
    s.codes = weight.rows;
    s.features = weight.features;
    STD_TORCH_CHECK(
        s.x.features == s.features, "expected x of D = ", s.features, " features as in weight, got ", s.x.features);
    check_device("indices", indices);
    STD_TORCH_CHECK(
        indices.scalar_type() == ScalarType::Long, "expected indices of dtype int64, got ",
        torch::headeronly::toString(indices.scalar_type()));
    STD_TORCH_CHECK(
        indices.dim() == x.dim(), "expected indices of ", x.dim(), " dimensions, as many as x has, got ",
        indices.dim());
    s.k = indices.size(indices.dim() - 1);
    STD_TORCH_CHECK(
        indices.numel() == s.x.count * s.k, "expected indices of shape [..., k] for the ", s.x.count,
        " vectors of x, got ", shape_text(indices));
    s.indices = data_of<const int64_t>(indices_);

    const int64_t panels = (s.codes + all.panel - 1) / all.panel;
    start_.assign(panels * all.panel, -std::numeric_limits<float>::infinity());
    std::fill_n(start_.begin(), s.codes, 0.0f);
    if (bias.has_value()) {
      STD_TORCH_CHECK(
          bias->dim() == 1 && bias->size(0) == s.codes, "expected bias of shape [K] = [", s.codes, "], got ",
          shape_text(*bias));
      const Matrix column("bias", torch::stable::unsqueeze(*bias, 1));
      std::copy_n(column.data, s.codes, start_.begin());
    }
    panels_ = new_tensor(x, {panels, s.features, all.panel});
    float* const to = data_of<float>(panels_);
    parallel(panels, 1 + 16384 / (s.features * all.panel), [&](int64_t begin, int64_t end) {
      all.pack_weight(weight.data, s.codes, s.features, begin, end, to);
    });
    s.panels = to;
    s.start = start_.data();
  }

 private:
  static const Tensor& checked(const Tensor& weight) {
    check_device("weight", weight);
    STD_TORCH_CHECK(weight.dim() == 2, "expected weight of shape [K, D], got ", shape_text(weight));
    return weight;
  }

  Tensor indices_, panels_;
  std::vector<float> start_;
};

// Returns a contiguous float32 tensor of the forward pass after checking its type and size.
Tensor adjacent(const char* name, const Tensor& tensor, int64_t numel) {
  check_device(name, tensor);
  STD_TORCH_CHECK(
      tensor.scalar_type() == ScalarType::Float, "expected ", name, " of dtype float32, got ",
      torch::headeronly::toString(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.numel() == numel, "expected ", name, " of ", numel, " elements, got ", tensor.numel());
  return torch::stable::contiguous(tensor);
}

}  // namespace

std::tuple<Tensor, Tensor> kept_softmax_fwd(
    const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, const Tensor& indices) {
  Inputs inputs(x, weight, bias, indices);
  KeptSoftmax& s = inputs.s;
  const Tensor values = new_tensor(x, shape_of(indices)), sums = new_tensor(x, shape_with(x, {2}));
  s.values = data_of<float>(values);
  s.sums = data_of<float>(sums);
  const Kernels& all = kernels();
  parallel(s.x.count, all.panel, [&](int64_t begin, int64_t end) { all.kept_softmax_rows(s, begin, end); });
  return {values, sums};
}

std::tuple<Tensor, Tensor, Tensor> kept_softmax_bwd(
    const Tensor& grad, const Tensor& values, const Tensor& sums, const Tensor& x, const Tensor& weight,
    std::optional<Tensor> bias, const Tensor& indices, bool need_x, bool need_weight, bool need_bias) {
  Inputs inputs(x, weight, bias, indices);
  KeptSoftmaxBackward b{};
  b.forward = inputs.s;
  KeptSoftmax& s = b.forward;
  const int64_t rows = s.x.count;
  const Tensor grads = adjacent("grad", grad, rows * s.k), kept = adjacent("values", values, rows * s.k),
               saved = adjacent("sums", sums, 2 * rows);
  b.grad = data_of<float>(grads);
  s.values = data_of<float>(kept);
  s.sums = data_of<float>(saved);
  const Kernels& all = kernels();
  const int64_t panels = (s.features + all.panel - 1) / all.panel, tiles = (s.codes + all.rows - 1) / all.rows;

  Tensor grad_x = new_tensor(x, need_x ? shape_of(x) : std::vector<int64_t>{0}), columns;
  if (need_x) {
    b.grad_x = rows_of("grad_x", grad_x);
    columns = new_tensor(x, {panels, s.codes, all.panel});
    b.columns = data_of<float>(columns);
    parallel(panels, 1 + 16384 / (s.codes * all.panel), [&](int64_t begin, int64_t end) {
      all.pack_weight_columns(inputs.weight.data, s.codes, s.features, begin, end, data_of<float>(columns));
    });
  }
  b.needs_weight = need_weight;
  b.needs_bias = need_bias;
  const int64_t fitting = SUPERBLOCK_BYTES / 4 / s.codes / SMALLEST_SUPERBLOCK * SMALLEST_SUPERBLOCK;
  const int64_t superblock = std::min(std::max(fitting, SMALLEST_SUPERBLOCK), std::max<int64_t>(rows, 1));
  // Tiles a power of two apart would map to the same sets of the caches.
  b.room = superblock + 4;
  Tensor logits, packed_rows, total;
  if (need_weight || need_bias) logits = new_tensor(x, {tiles, b.room, all.rows});
  if (need_weight) {
    packed_rows = new_tensor(x, {panels, b.room, all.panel});
    total = new_tensor(x, {panels, tiles, all.rows, all.panel});
    torch::stable::zero_(total);
    b.rows = data_of<float>(packed_rows);
    b.weight = data_of<float>(total);
  }
  if (need_weight || need_bias) b.logits = data_of<float>(logits);
  std::vector<double> bias_total(need_bias ? tiles * all.rows : 0);
  b.bias = bias_total.data();

  for (int64_t origin = 0; origin < rows; origin += superblock) {
    const int64_t count = std::min(superblock, rows - origin);
    parallel(count, all.panel, [&](int64_t begin, int64_t end) {
      all.kept_softmax_grad_rows(b, origin, origin + begin, origin + end);
    });
    if (!need_weight && !need_bias) continue;
    parallel(tiles, 1, [&](int64_t begin, int64_t end) { all.kept_softmax_grad_codes(b, count, begin, end); });
  }

  Tensor grad_weight = new_tensor(x, need_weight ? std::vector<int64_t>{s.codes, s.features} : std::vector<int64_t>{0});
  if (need_weight) {
    parallel(s.codes, 1 + 16384 / s.features, [&](int64_t begin, int64_t end) {
      all.unpack_weight(b, begin, end, data_of<float>(grad_weight));
    });
  }
  Tensor grad_bias = new_tensor(x, {need_bias ? s.codes : 0});
  if (need_bias) std::copy_n(bias_total.begin(), s.codes, data_of<float>(grad_bias));
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace dlvae
