// Entropies of the softmax over all codes, sums of the probabilities, and their gradients against plain sums in float64.
#include <algorithm>

#include "check.h"

namespace dlvae {
namespace {

using Sums = std::vector<double>;

void check_near(const char* what, const Numbers& found, const Sums& exact, double allowed) {
  for (size_t i = 0; i < exact.size(); ++i)
    CHECK(std::abs(found[i] - exact[i]) <= allowed, "%s %zu is %g, not %g", what, i, found[i], exact[i]);
}

// Logits x W^T + b of `features` products below 1. Every third row is not valid if `masks`.
void test_case(const Kernels& kernels, Random& random, int64_t n, int64_t count, int64_t features, bool masks) {
  Numbers x = numbers(random, n * features), weight = numbers(random, count * features), bias = numbers(random, count);
  Numbers grad = numbers(random, n), slope = numbers(random, count);
  std::vector<char> valid(n);
  for (int64_t r = 0; r < n; ++r) valid[r] = !masks || r % 3 != 1;
  for (int64_t r = 0; r < n; ++r)
    if (!valid[r]) x[r * features] = NAN;
  const auto panels_of = [&](int64_t columns) { return (columns + kernels.panel - 1) / kernels.panel; };
  const int64_t panels = panels_of(features), padded = panels_of(count) * kernels.panel;
  const int64_t tiles = (count + kernels.rows - 1) / kernels.rows, room = n + 4;
  Numbers packed(padded * features, NAN), columns(panels * count * kernels.panel, NAN), start(padded, -INFINITY);
  Numbers sums(2 * n, NAN), entropies(n, NAN), totals(padded, NAN), slopes(padded);
  std::copy(bias.begin(), bias.end(), start.begin());
  std::copy(slope.begin(), slope.end(), slopes.begin());
  kernels.pack_weight(weight.data(), count, features, 0, padded / kernels.panel, packed.data());
  kernels.pack_weight_columns(weight.data(), count, features, 0, panels, columns.data());
  CodeEntropyBackward b{};
  KeptSoftmax& s = b.softmax.forward;
  s.x = adjacent_rows(x, n, features);
  s.codes = count;
  s.features = features;
  s.panels = packed.data();
  s.start = start.data();
  s.sums = sums.data();
  b.forward = {s, masks ? reinterpret_cast<const bool*>(valid.data()) : nullptr, entropies.data()};
  kernels.code_entropy_rows(b.forward, 0, n, totals.data());

  Numbers grad_x(n * features, NAN), rows(panels * room * kernels.panel, NAN), logits(tiles * room * kernels.rows, NAN);
  Numbers total(panels * tiles * kernels.rows * kernels.panel), grad_weight(count * features, NAN);
  Sums grad_bias(tiles * kernels.rows);
  b.grad_entropies = grad.data();
  b.slopes = slopes.data();
  b.softmax.columns = columns.data();
  b.softmax.needs_weight = b.softmax.needs_bias = true;
  b.softmax.grad_x = adjacent_rows(grad_x, n, features);
  b.softmax.room = room;
  b.softmax.logits = logits.data();
  b.softmax.rows = rows.data();
  b.softmax.weight = total.data();
  b.softmax.bias = grad_bias.data();
  kernels.code_entropy_grad_rows(b, 0, 0, n);
  kernels.kept_softmax_grad_codes(b.softmax, n, 0, tiles);
  kernels.unpack_weight(b.softmax, 0, count, grad_weight.data());

  Sums exact(n), exact_totals(count), exact_x(n * features), exact_weight(count * features), exact_bias(count);
  Sums p(count), z(count);
  for (int64_t r = 0; r < n; ++r) {
    if (!valid[r]) {
      CHECK(sums[2 * r] == 0 && std::isinf(sums[2 * r + 1]), "the sums of row %ld are not 0 and infinity", (long)r);
      continue;
    }
    double most = -INFINITY, sum = 0, expected = 0;
    for (int64_t i = 0; i < count; ++i) {
      z[i] = bias[i];
      for (int64_t d = 0; d < features; ++d) z[i] += (double)x[r * features + d] * weight[i * features + d];
      most = std::max(most, z[i]);
    }
    for (int64_t i = 0; i < count; ++i) sum += p[i] = std::exp(z[i] - most);
    for (int64_t i = 0; i < count; ++i) {
      p[i] /= sum;
      exact[r] -= p[i] == 0 ? 0 : p[i] * std::log(p[i]);
      exact_totals[i] += p[i];
      expected += p[i] * slope[i];
    }
    for (int64_t i = 0; i < count; ++i) {
      const double g = p[i] == 0 ? 0 : p[i] * (slope[i] - expected - grad[r] * (std::log(p[i]) + exact[r]));
      exact_bias[i] += g;
      for (int64_t d = 0; d < features; ++d) {
        exact_x[r * features + d] += g * weight[i * features + d];
        exact_weight[i * features + d] += g * x[r * features + d];
      }
    }
  }
  // The logits have errors of about 1e-7 times their terms.
  const double allowed = 1e-5 * (1 + (double)features);
  check_near("entropy", entropies, exact, allowed);
  check_near("sum of probabilities", totals, exact_totals, allowed * (double)n);
  check_near("gradient of x", grad_x, exact_x, allowed);
  check_near("gradient of weight", grad_weight, exact_weight, allowed * (double)n);
  check_near("gradient of bias", Numbers(grad_bias.begin(), grad_bias.end()), exact_bias, allowed * (double)n);
}

}  // namespace

void test_entropy(const Kernels& kernels) {
  Random random;
  const int64_t p = kernels.panel, r = kernels.rows, w = p / 2;
  for (bool masks : {false, true}) {
    // Numbers of codes around the edges of a tile, a panel and a chunk; of features; and of rows.
    for (int64_t count : Sizes{1, 2, r + 1, p - 1, p, p + 1, 511, 512, 513, 1030})
      test_case(kernels, random, 5, count, 3, masks);
    for (int64_t d : Sizes{1, w - 1, w + 1, p, p + 1, 65}) test_case(kernels, random, r + 1, p + 3, d, masks);
    for (int64_t n : Sizes{0, 1, r, 64, 129}) test_case(kernels, random, n, 9, 2, masks);
  }
}

}  // namespace dlvae
