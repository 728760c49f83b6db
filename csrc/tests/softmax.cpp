// The kept softmax and its gradients against plain sums in float64.
#include <algorithm>
#include <cmath>

#include "check.h"

namespace dlvae {
namespace {

using Sums = std::vector<double>;

void check_close(const char* what, const Numbers& found, const Sums& exact) {
  for (size_t i = 0; i < exact.size(); ++i)
    CHECK(std::abs(found[i] - exact[i]) <= 2e-5, "%s %zu is %g, not %g", what, i, found[i], exact[i]);
}

void test_case(const Kernels& kernels, int64_t n, int64_t count, int64_t features, int64_t k, int64_t superblock) {
  Random random;
  Numbers x = numbers(random, n * features), weight = numbers(random, count * features);
  const Numbers bias = numbers(random, count), grad = numbers(random, n * k);
  std::vector<int64_t> indices(n * k);
  for (int64_t& index : indices) index = random.below(count);
  const auto panels_of = [&](int64_t columns) { return (columns + kernels.panel - 1) / kernels.panel; };
  const int64_t panels = panels_of(features), tiles = (count + kernels.rows - 1) / kernels.rows;

  Numbers packed(panels_of(count) * kernels.panel * features), columns(panels * count * kernels.panel);
  Numbers start(panels_of(count) * kernels.panel, -INFINITY), values(n * k), sums(2 * n);
  std::copy(bias.begin(), bias.end(), start.begin());
  kernels.pack_weight(weight.data(), count, features, 0, panels_of(count), packed.data());
  kernels.pack_weight_columns(weight.data(), count, features, 0, panels, columns.data());
  KeptSoftmaxBackward b{};
  KeptSoftmax& s = b.forward;
  s.x = adjacent_rows(x, n, features);
  s.codes = count;
  s.features = features;
  s.k = k;
  s.panels = packed.data();
  s.start = start.data();
  s.indices = indices.data();
  s.values = values.data();
  s.sums = sums.data();
  kernels.kept_softmax_rows(s, 0, n / 3);
  kernels.kept_softmax_rows(s, n / 3, n);

  Numbers grad_x(n * features), grad_weight(count * features), rows(panels * (superblock + 4) * kernels.panel);
  Numbers logits(tiles * (superblock + 4) * kernels.rows), total(panels * tiles * kernels.rows * kernels.panel);
  Sums grad_bias(tiles * kernels.rows);
  b.grad = grad.data();
  b.columns = columns.data();
  b.needs_weight = b.needs_bias = true;
  b.grad_x = adjacent_rows(grad_x, n, features);
  b.room = superblock + 4;
  b.logits = logits.data();
  b.rows = rows.data();
  b.weight = total.data();
  b.bias = grad_bias.data();
  for (int64_t origin = 0; origin < n; origin += superblock) {
    const int64_t rest = std::min(superblock, n - origin);
    kernels.kept_softmax_grad_rows(b, origin, origin, origin + rest / 2);
    kernels.kept_softmax_grad_rows(b, origin, origin + rest / 2, origin + rest);
    kernels.kept_softmax_grad_codes(b, rest, 0, tiles / 2);
    kernels.kept_softmax_grad_codes(b, rest, tiles / 2, tiles);
  }
  kernels.unpack_weight(b, 0, count, grad_weight.data());

  Sums exact(n * k), exact_x(n * features), exact_weight(count * features), exact_bias(count), p(count), g(count);
  for (int64_t r = 0; r < n; ++r) {
    double sum = 0, slope = 0;
    for (int64_t c = 0; c < count; ++c) {
      double logit = bias[c];
      for (int64_t d = 0; d < features; ++d) logit += (double)x[r * features + d] * weight[c * features + d];
      sum += p[c] = std::exp(logit);
    }
    for (int64_t j = r * k; j < (r + 1) * k; ++j) slope += grad[j] * (exact[j] = p[indices[j]] / sum);
    for (int64_t c = 0; c < count; ++c) g[c] = -slope * p[c] / sum;
    for (int64_t j = r * k; j < (r + 1) * k; ++j) g[indices[j]] += grad[j] * exact[j];
    for (int64_t c = 0; c < count; ++c) {
      exact_bias[c] += g[c];
      for (int64_t d = 0; d < features; ++d) {
        exact_x[r * features + d] += g[c] * weight[c * features + d];
        exact_weight[c * features + d] += g[c] * x[r * features + d];
      }
    }
  }
  check_close("value", values, exact);
  check_close("gradient of x", grad_x, exact_x);
  check_close("gradient of weight", grad_weight, exact_weight);
  check_close("gradient of bias", Numbers(grad_bias.begin(), grad_bias.begin() + count), exact_bias);
}

}  // namespace

void test_softmax(const Kernels& kernels) {
  test_case(kernels, 1, 1, 1, 1, 1);
  test_case(kernels, 9, 31, 3, 4, 9);
  test_case(kernels, 130, 7, 65, 2, 64);
  test_case(kernels, 20, 530, 33, 17, 7);
  test_case(kernels, 300, 40, 16, 3, 256);
}

}  // namespace dlvae
