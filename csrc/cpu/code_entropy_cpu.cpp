// Entropies of soft assignments: the softmax of logits (2 x.c - |c|^2) / temperature, which is that of the negated
// squared distances, because |x|^2 is the same for all codes.
#include <optional>
#include <tuple>

#include "softmax_gradients.h"

namespace dlvae {
namespace {

// The probabilities of a group of rows are summed in float32, the groups of a wave side by side, and the sums of all
// groups in float64.
constexpr int64_t GROUP = 128, WAVE = 64;

// Converts x, codebook and mask to the form that the kernels read, and owns the copies.
class Inputs {
 public:
  CodeEntropy e{};
  Matrix codes;
  std::vector<float> weight;  // [K, D]: 2 c / temperature

  Inputs(const Tensor& x, const Tensor& codebook, double temperature, const std::optional<Tensor>& mask)
      : codes("codebook", checked(codebook)), weight(codes.rows * codes.features) {
    KeptSoftmax& s = e.softmax;
    s.x = rows_of("x", x);
    STD_TORCH_CHECK(
        s.x.features == codes.features, "expected x of D = ", codes.features, " features as in codebook, got ",
        s.x.features);
    num_valid = s.x.count;
    if (mask.has_value()) {
      check_device("mask", *mask);
      STD_TORCH_CHECK(
          mask->scalar_type() == ScalarType::Bool && mask->numel() == s.x.count, "expected mask of dtype bool with ",
          s.x.count, " elements, got ", shape_text(*mask));
      mask_ = torch::stable::contiguous(*mask);
      e.valid = data_of<const bool>(mask_);
      num_valid = std::count(e.valid, e.valid + s.x.count, true);
    }
    std::vector<float> bias(codes.rows);
    parallel(codes.rows, 1 + 16384 / codes.features, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        double squares = 0;
        for (int64_t d = i * codes.features; d < (i + 1) * codes.features; ++d) {
          squares += (double)codes.data[d] * codes.data[d];
          weight[d] = (float)(2 / temperature * codes.data[d]);
        }
        bias[i] = (float)(-squares / temperature);
      }
    });
    packed_.emplace(x, weight.data(), codes.rows, codes.features, bias.data());
    packed_->set(s);
  }
  int64_t num_valid;

 private:
  static const Tensor& checked(const Tensor& codebook) {
    check_device("codebook", codebook);
    STD_TORCH_CHECK(
        codebook.dim() == 2 && codebook.size(0) >= 1, "expected codebook of shape [K, D] with K >= 1, got ",
        shape_text(codebook));
    return codebook;
  }

  Tensor mask_;
  std::optional<SoftmaxWeight> packed_;
};

int64_t whole_panels(int64_t codes) { return (codes + kernels().panel - 1) / kernels().panel * kernels().panel; }

}  // namespace

std::tuple<Tensor, Tensor, Tensor> code_entropy_fwd(
    const Tensor& x, const Tensor& codebook, double temperature, std::optional<Tensor> mask) {
  Inputs inputs(x, codebook, temperature, mask);
  CodeEntropy& e = inputs.e;
  const Tensor entropies = new_tensor(x, shape_with(x, {})), sums = new_tensor(x, shape_with(x, {2}));
  e.entropies = data_of<float>(entropies);
  e.softmax.sums = data_of<float>(sums);
  const Kernels& all = kernels();
  const int64_t rows = e.softmax.x.count, columns = whole_panels(inputs.codes.rows);
  const int64_t groups = (rows + GROUP - 1) / GROUP, wave = std::min(groups, WAVE);
  const Array<float> parts = new_array<float>(std::max<int64_t>(1, wave * columns));
  std::vector<double> total(columns);
  for (int64_t origin = 0; origin < groups; origin += wave) {
    const int64_t count = std::min(wave, groups - origin);
    parallel(count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = (origin + i) * GROUP;
        all.code_entropy_rows(e, first, std::min(first + GROUP, rows), parts.get() + i * columns);
      }
    });
    for (int64_t i = 0; i < count; ++i)
      for (int64_t k = 0; k < columns; ++k) total[k] += parts[i * columns + k];
  }
  const Tensor means = new_tensor(x, {inputs.codes.rows});
  const double num_valid = static_cast<double>(std::max<int64_t>(1, inputs.num_valid));
  for (int64_t k = 0; k < inputs.codes.rows; ++k) data_of<float>(means)[k] = static_cast<float>(total[k] / num_valid);
  return {entropies, sums, means};
}

std::tuple<Tensor, Tensor> code_entropy_bwd(
    const Tensor& grad_entropies, const Tensor& grad_mean_probabilities, const Tensor& x, const Tensor& codebook,
    const Tensor& sums, const Tensor& entropies, double temperature, std::optional<Tensor> mask, bool need_x,
    bool need_codebook) {
  Inputs inputs(x, codebook, temperature, mask);
  CodeEntropyBackward b{};
  b.forward = inputs.e;
  const int64_t rows = inputs.e.softmax.x.count, codes = inputs.codes.rows, features = inputs.codes.features;
  const Tensor grads = adjacent("grad_entropies", grad_entropies, rows), saved = adjacent("sums", sums, 2 * rows),
               own = adjacent("entropies", entropies, rows);
  const Tensor grad_means = adjacent("grad_mean_probabilities", grad_mean_probabilities, codes);
  b.forward.entropies = data_of<float>(own);
  b.grad_entropies = data_of<float>(grads);
  std::vector<float> slopes(whole_panels(codes));
  for (int64_t k = 0; k < codes; ++k)
    slopes[k] = data_of<float>(grad_means)[k] / static_cast<float>(std::max<int64_t>(1, inputs.num_valid));
  b.slopes = slopes.data();
  b.softmax.forward = inputs.e.softmax;
  b.softmax.forward.sums = data_of<float>(saved);
  SoftmaxGradients gradients(x, b.softmax, inputs.weight.data(), need_x, need_codebook, need_codebook);
  gradients.run(
      [&](int64_t origin, int64_t begin, int64_t end) { kernels().code_entropy_grad_rows(b, origin, begin, end); });
  // The weight is 2 c / temperature, the bias -|c|^2 / temperature.
  const Tensor grad_codebook = gradients.grad_weight();
  float* const grad = data_of<float>(grad_codebook);
  for (int64_t k = 0; need_codebook && k < codes; ++k)
    for (int64_t d = k * features; d < (k + 1) * features; ++d)
      grad[d] = static_cast<float>(2 / temperature * (grad[d] - gradients.grad_bias[k] * inputs.codes.data[d]));
  return {gradients.grad_x, grad_codebook};
}

}  // namespace dlvae
