#include <optional>
#include <tuple>

#include "softmax_gradients.h"

namespace dlvae {
namespace {

// Converts x, weight, bias and indices to the form that the kernels read, and owns the copies.
class Inputs {
 public:
  KeptSoftmax s{};
  Matrix weight;

  Inputs(const Tensor& x, const Tensor& weights, const std::optional<Tensor>& bias, const Tensor& indices)
      : weight("weight", checked(weights)), indices_(torch::stable::contiguous(indices)) {
    s.x = rows_of("x", x);
    STD_TORCH_CHECK(
        s.x.features == weight.features, "expected x of D = ", weight.features, " features as in weight, got ",
        s.x.features);
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
    std::optional<Matrix> column;
    if (bias.has_value()) {
      STD_TORCH_CHECK(
          bias->dim() == 1 && bias->size(0) == weight.rows, "expected bias of shape [K] = [", weight.rows, "], got ",
          shape_text(*bias));
      column.emplace("bias", torch::stable::unsqueeze(*bias, 1));
    }
    packed_.emplace(x, weight.data, weight.rows, weight.features, column ? column->data : nullptr);
    packed_->set(s);
  }

 private:
  static const Tensor& checked(const Tensor& weight) {
    check_device("weight", weight);
    STD_TORCH_CHECK(weight.dim() == 2, "expected weight of shape [K, D], got ", shape_text(weight));
    return weight;
  }

  Tensor indices_;
  std::optional<SoftmaxWeight> packed_;
};

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
  SoftmaxGradients gradients(x, b, inputs.weight.data, need_x, need_weight, need_bias);
  gradients.run(
      [&](int64_t origin, int64_t begin, int64_t end) { kernels().kept_softmax_grad_rows(b, origin, begin, end); });
  const Tensor grad_bias = new_tensor(x, {need_bias ? s.codes : 0});
  if (need_bias) std::copy_n(gradients.grad_bias.begin(), s.codes, data_of<float>(grad_bias));
  return {gradients.grad_x, gradients.grad_weight(), grad_bias};
}

}  // namespace dlvae
