#include <cmath>
#include <string>
#include <tuple>

#include "operations.h"

namespace dlvae {
namespace {

// Codes and biases that are finite apart from those that are not.
struct Codes {
  std::vector<int32_t> finite, others;
  int64_t infinite;
  double largest;  // |c|^2 among the finite

  Codes(const Topk& t, const std::vector<double>& squares) : largest(0) {
    std::vector<int32_t> nans;
    for (int64_t c = 0; c < t.count; ++c) {
      const double bias = t.bias == nullptr ? 0 : t.bias[c], both = squares[c] + std::abs(bias);
      if (std::isnan(both)) {
        nans.push_back((int32_t)c);
      } else if (std::isinf(both)) {
        others.push_back((int32_t)c);
      } else {
        finite.push_back((int32_t)c);
        largest = std::max(largest, squares[c]);
      }
    }
    infinite = (int64_t)others.size();
    others.insert(others.end(), nans.begin(), nans.end());
  }
};

float start_of(const Topk& t, double square, int64_t code) {
  const double start = t.is_product ? (t.bias == nullptr ? 0 : -(double)t.bias[code]) : square / 2;
  return (float)std::min<double>(std::max<double>(start * t.scale, -LARGEST_START), LARGEST_START);
}

}  // namespace

std::tuple<Tensor, Tensor> topk_codes(
    const Tensor& x, const Tensor& dictionary, int64_t k, std::string metric, std::optional<Tensor> bias) {
  check_device("dictionary", dictionary);
  STD_TORCH_CHECK(metric == "l2" || metric == "dot", "metric is '", metric, "'; it needs to be 'l2' or 'dot'");
  STD_TORCH_CHECK(dictionary.dim() == 2, "dictionary has ", dictionary.dim(), " dimensions; it needs [K, D]");
  const Matrix codes("dictionary", dictionary);
  Topk t{};
  t.x = rows_of("x", x);
  STD_TORCH_CHECK(
      t.x.features == codes.features, "x has ", t.x.features, " features; it needs the D = ", codes.features,
      " of dictionary");
  STD_TORCH_CHECK(k >= 1 && k <= codes.rows, "k is ", k, "; it needs to be in [1, ", codes.rows, "]");
  STD_TORCH_CHECK(codes.rows < 1 << 30, "dictionary has ", codes.rows, " rows; it needs fewer than 2^30");
  t.codes = codes.data;
  t.count = codes.rows;
  t.features = codes.features;
  t.k = k;
  t.is_product = metric == "dot";
  std::optional<Matrix> biases;
  if (bias.has_value()) {
    STD_TORCH_CHECK(t.is_product, "bias is given; it needs to be None with the metric 'l2'");
    STD_TORCH_CHECK(
        bias->dim() == 1 && bias->size(0) == t.count, "bias has another shape; it needs [K] with the K = ", t.count,
        " of dictionary");
    biases.emplace("bias", torch::stable::unsqueeze(*bias, 1));
    t.bias = biases->data;
  }
  const Tensor indices = new_tensor(x, shape_with(x, {k}), ScalarType::Long);
  const Tensor values = new_tensor(x, shape_with(x, {k}));
  t.indices = static_cast<int64_t*>(indices.data_ptr());
  t.values = static_cast<float*>(values.data_ptr());
  if (t.x.count == 0) return {indices, values};

  const Kernels& all = kernels();
  const int64_t grain = 1 + 16384 / t.features;
  std::vector<double> squares(t.count);
  parallel(t.count, grain, [&](int64_t begin, int64_t end) {
    all.square_codes(t.codes, begin, end, t.features, squares.data());
  });
  const Codes split(t, squares);
  t.packed = (int64_t)split.finite.size();
  t.ids = t.packed == t.count ? nullptr : split.finite.data();
  t.others = split.others.data();
  t.infinite = split.infinite;
  const double longest = std::sqrt(split.largest);
  // Within the exponents of float32, where a code has any length at all.
  const int exponent = longest == 0 ? 0 : std::max(-120, std::min(120, std::ilogb(longest)));
  t.scale = std::ldexp(1.0f, -exponent);
  t.norm = longest * t.scale;

  const int64_t panels = (t.packed + all.panel - 1) / all.panel;
  std::vector<float> start(panels * all.panel, NO_CODE);
  for (int64_t i = 0; i < t.packed; ++i) {
    const int64_t code = t.ids == nullptr ? i : t.ids[i];
    start[i] = start_of(t, squares[code], code);
  }
  const Tensor packed = new_tensor(x, {panels, t.features, all.panel});
  float* const to = static_cast<float*>(packed.data_ptr());
  t.panels = to;
  t.start = start.data();
  parallel(panels, 1 + grain / all.panel, [&](int64_t begin, int64_t end) { all.pack_topk(t, begin, end, to); });
  parallel(t.x.count, all.panel, [&](int64_t begin, int64_t end) { all.topk_rows(t, begin, end); });
  return {indices, values};
}

}  // namespace dlvae
