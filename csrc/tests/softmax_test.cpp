// The kept softmax and its gradients against plain sums in float64.
#include <algorithm>

#include "check.h"

namespace dlvae {
namespace {

using Sums = std::vector<double>;

struct Case {
  int64_t n, count, features, k, superblock;
  Form form;
  bool needs_x, needs_weight, needs_bias;
};

// Checks that each value has an error of at most a fraction of the size of the terms of its sum.
void check_close(
    const char* what, const Numbers& found, const Sums& exact, const Sums& sizes, double share, Form form = PLAIN) {
  for (size_t i = 0; i < exact.size(); ++i) {
    const double allowed = share * sizes[i] + rounding_of(form, exact[i]) + 1e-36;
    const bool is_close = std::isnan(exact[i]) ? std::isnan(found[i]) : std::abs(found[i] - exact[i]) <= allowed;
    CHECK(is_close, "%s %zu is %g, not %g", what, i, found[i], exact[i]);
  }
}

struct Inputs {
  Numbers x, weight, bias, grad;
  std::vector<int64_t> indices;

  Inputs(Random& random, const Case& c)
      : x(numbers(random, c.n * c.features)),
        weight(numbers(random, c.count * c.features)),
        bias(numbers(random, c.count)),
        grad(numbers(random, c.n * c.k)),
        indices(c.n * c.k) {
    for (int64_t& index : indices) index = random.below(c.count);
  }
};

void test_case(const Kernels& kernels, const Case& c, const Inputs& in) {
  const int64_t n = c.n, count = c.count, features = c.features, k = c.k;
  const Tensor tensor(kernels, c.form, in.x, n, features);
  const Numbers x = tensor.values();
  const auto panels_of = [&](int64_t columns) { return (columns + kernels.panel - 1) / kernels.panel; };
  const int64_t panels = panels_of(features), code_panels = panels_of(count);
  const int64_t tiles = (count + kernels.rows - 1) / kernels.rows, room = c.superblock + 4;

  Numbers packed(code_panels * kernels.panel * features, NAN), columns(panels * count * kernels.panel, NAN);
  Numbers start(code_panels * kernels.panel, -INFINITY), values(n * k, NAN), sums(2 * n, NAN);
  std::copy(in.bias.begin(), in.bias.end(), start.begin());
  kernels.pack_weight(in.weight.data(), count, features, code_panels / 2, code_panels, packed.data());
  kernels.pack_weight(in.weight.data(), count, features, 0, code_panels / 2, packed.data());
  kernels.pack_weight_columns(in.weight.data(), count, features, panels / 2, panels, columns.data());
  kernels.pack_weight_columns(in.weight.data(), count, features, 0, panels / 2, columns.data());
  KeptSoftmaxBackward b{};
  KeptSoftmax& s = b.forward;
  s.x = tensor.rows;
  s.codes = count;
  s.features = features;
  s.k = k;
  s.panels = packed.data();
  s.start = start.data();
  s.indices = in.indices.data();
  s.values = values.data();
  s.sums = sums.data();
  kernels.kept_softmax_rows(s, n / 3, n);
  kernels.kept_softmax_rows(s, 0, n / 3);

  // A gradient that is not needed has no memory.
  const Tensor grad_x(kernels, c.form, Numbers(n * features, NAN), n, features);
  const bool needs_codes = c.needs_weight || c.needs_bias;
  Numbers rows(c.needs_weight ? panels * room * kernels.panel : 0, NAN);
  Numbers logits(needs_codes ? tiles * room * kernels.rows : 0, NAN);
  Numbers total(c.needs_weight ? panels * tiles * kernels.rows * kernels.panel : 0);
  Numbers grad_weight(c.needs_weight ? count * features : 0, NAN);
  Sums grad_bias(c.needs_bias ? tiles * kernels.rows : 0);
  b.grad = in.grad.data();
  b.columns = c.needs_x ? columns.data() : nullptr;
  b.needs_weight = c.needs_weight;
  b.needs_bias = c.needs_bias;
  if (c.needs_x) b.grad_x = grad_x.rows;
  b.room = room;
  b.logits = logits.data();
  b.rows = rows.data();
  b.weight = total.data();
  b.bias = grad_bias.data();
  for (int64_t origin = 0; origin < n; origin += c.superblock) {
    const int64_t rest = std::min(c.superblock, n - origin);
    kernels.kept_softmax_grad_rows(b, origin, origin + rest / 2, origin + rest);
    kernels.kept_softmax_grad_rows(b, origin, origin, origin + rest / 2);
    if (!needs_codes) continue;
    kernels.kept_softmax_grad_codes(b, rest, tiles / 2, tiles);
    kernels.kept_softmax_grad_codes(b, rest, 0, tiles / 2);
  }
  if (c.needs_weight) {
    kernels.unpack_weight(b, count / 2, count, grad_weight.data());
    kernels.unpack_weight(b, 0, count / 2, grad_weight.data());
  }

  // The exact value of each result, and the size of its terms.
  Sums exact(n * k), exact_x(n * features), exact_weight(count * features), exact_bias(count);
  Sums size(n * k), size_x(n * features), size_weight(count * features), size_bias(count);
  Sums p(count), g(count), size_g(count);
  double longest = 1;  // size of the terms of the logits
  for (int64_t r = 0; r < n; ++r) {
    double most = -INFINITY, sum = 0, slope = 0, size_slope = 0;
    for (int64_t i = 0; i < count; ++i) {
      double logit = in.bias[i], length = std::abs(logit);
      for (int64_t d = 0; d < features; ++d) {
        const double term = (double)x[r * features + d] * in.weight[i * features + d];
        logit += term;
        length += std::abs(term);
      }
      p[i] = logit;
      most = logit > most ? logit : most;
      if (std::isfinite(length)) longest = std::max(longest, length);
    }
    for (double& each : p) sum += each = std::exp(each - most);
    for (int64_t j = r * k; j < (r + 1) * k; ++j) {
      size[j] = exact[j] = p[in.indices[j]] / sum;
      slope += in.grad[j] * exact[j];
      size_slope += std::abs(in.grad[j]) * exact[j];
    }
    if (std::isfinite(sum)) {
      CHECK(std::abs(sums[2 * r] - most) <= 1e-6 * longest, "the largest logit is %g, not %g", sums[2 * r], most);
      CHECK(std::abs(sums[2 * r + 1] - sum) <= 2e-6 * longest * sum, "a sum is %g, not %g", sums[2 * r + 1], sum);
    } else {
      CHECK(std::isnan(sums[2 * r + 1]), "a sum is %g, not NaN", sums[2 * r + 1]);
    }
    for (int64_t i = 0; i < count; ++i) {
      g[i] = -slope * p[i] / sum;
      size_g[i] = size_slope * p[i] / sum;
    }
    for (int64_t j = r * k; j < (r + 1) * k; ++j) {
      g[in.indices[j]] += in.grad[j] * exact[j];
      size_g[in.indices[j]] += std::abs(in.grad[j]) * exact[j];
    }
    for (int64_t i = 0; i < count; ++i) {
      exact_bias[i] += g[i];
      size_bias[i] += size_g[i];
      for (int64_t d = 0; d < features; ++d) {
        const double w = in.weight[i * features + d], v = x[r * features + d];
        exact_x[r * features + d] += g[i] * w;
        size_x[r * features + d] += size_g[i] * std::abs(w);
        exact_weight[i * features + d] += g[i] * v;
        size_weight[i * features + d] += size_g[i] * std::abs(v);
      }
    }
  }
  const double share = 2e-6 * longest;
  check_close("value", values, exact, size, share);
  if (c.needs_x) check_close("gradient of x", grad_x.values(), exact_x, size_x, share, c.form);
  if (c.needs_weight) check_close("gradient of weight", grad_weight, exact_weight, size_weight, share);
  if (!c.needs_bias) return;
  const Numbers found_bias(grad_bias.begin(), grad_bias.begin() + count);
  check_close("gradient of bias", found_bias, exact_bias, size_bias, share);
}

}  // namespace

void test_softmax(const Kernels& kernels) {
  Random random;
  const int64_t p = kernels.panel, r = kernels.rows, w = p / 2;
  const auto test = [&](int64_t n, int64_t count, int64_t d, int64_t k, int64_t superblock, Form form = PLAIN) {
    const Case c{n, count, d, k, superblock, form, true, true, true};
    test_case(kernels, c, Inputs(random, c));
  };
  // Numbers of codes around the edges of a tile, a panel and a chunk; of features around those of a vector, a chain and
  // a slice.
  for (int64_t count : Sizes{1, 2, r + 1, p - 1, p, p + 1, 511, 512, 513, 1030}) test(5, count, 3, 2, 5);
  for (int64_t d : Sizes{1, w - 1, w + 1, p, p + 1, 64, 65, 257}) test(r + 1, p + 3, d, 3, r + 1);
  for (int64_t k : Sizes{0, 1, w - 1, w, w + 1, 2 * w + 3}) test(3, 20, 2, k, 3);
  // Numbers of rows around the edges of a tile, a block, a chain and a slice; in several superblocks.
  for (int64_t n : Sizes{0, 1, r, 64, 65, 129, 257}) test(n, 9, 2, 2, 300);
  test(130, 7, 5, 2, 64);
  test(20, 270, 3, 4, 7);
  test(2 * r + 1, p + 1, 5000, 2, 2 * r + 1);
  for (Form form : FORMS) test(r + 3, p + 1, w + 3, 3, 6, form);
  // Every subset of the gradients.
  for (int needed = 0; needed < 8; ++needed) {
    const Case c{9, p + 3, w + 1, 3, 5, PLAIN, (needed & 1) != 0, (needed & 2) != 0, (needed & 4) != 0};
    test_case(kernels, c, Inputs(random, c));
  }
  const Case c{9, 530, 3, 4, 9, PLAIN, true, true, true};
  // Logits that are far apart; codes that are ruled out, also in whole chunks.
  Inputs far(random, c), ruled_out(random, c);
  far.weight = times(far.weight, 60);
  test_case(kernels, c, far);
  std::fill(ruled_out.bias.begin(), ruled_out.bias.begin() + 515, -INFINITY);
  test_case(kernels, c, ruled_out);
  // Rows whose softmax is NaN must not affect the others.
  const Case forward{9, 530, 3, 4, 9, PLAIN, true, false, false};
  Inputs odd(random, forward), none(random, forward);
  odd.x[3] = NAN;
  odd.x[10] = INFINITY;
  test_case(kernels, forward, odd);
  std::fill(none.bias.begin(), none.bias.end(), -INFINITY);
  test_case(kernels, forward, none);
  for (float value : {NAN, INFINITY}) {
    Inputs spoiled(random, forward);
    spoiled.bias[value > 0 ? 2 : 520] = value;
    test_case(kernels, forward, spoiled);
  }
}

}  // namespace dlvae
