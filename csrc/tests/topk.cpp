// topk_rows against every score in float64.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "check.h"

namespace dlvae {
namespace {

struct Case {
  int64_t n, count, features, k;
  bool is_product;
  int64_t off;  // codes that are infinite, at the end
};

double score_of(const Topk& t, const float* x, int64_t code) {
  double sum = t.bias == nullptr ? 0 : t.bias[code];
  for (int64_t d = 0; d < t.features; ++d) {
    const double a = x[d], b = t.codes[code * t.features + d];
    sum += t.is_product ? a * b : (a - b) * (a - b);
  }
  const double score = t.is_product ? -sum : sum;
  return std::isfinite(score) ? score : 1e300;
}

void test_case(const Kernels& kernels, const Case& c, Numbers x, Numbers codes, const Numbers& bias) {
  for (int64_t i = (c.count - c.off) * c.features; i < c.count * c.features; ++i) codes[i] = INFINITY;
  Topk t{};
  t.x = adjacent_rows(x, c.n, c.features);
  t.codes = codes.data();
  t.bias = c.is_product ? bias.data() : nullptr;
  t.count = c.count;
  t.features = c.features;
  t.k = c.k;
  t.is_product = c.is_product;
  t.packed = c.count - c.off;
  std::vector<int32_t> others(c.off);
  std::iota(others.begin(), others.end(), (int32_t)t.packed);
  t.others = others.data();
  t.infinite = c.off;
  std::vector<double> squares(c.count);
  kernels.square_codes(t.codes, 0, t.count, t.features, squares.data());
  const double longest = t.packed ? *std::max_element(squares.begin(), squares.begin() + t.packed) : 0;
  t.scale = 0.25f;
  t.norm = std::sqrt(longest) * t.scale;
  const int64_t panels = (t.packed + kernels.panel - 1) / kernels.panel;
  Numbers packed(panels * kernels.panel * c.features), start(panels * kernels.panel, NO_CODE);
  for (int64_t i = 0; i < t.packed; ++i)
    start[i] = (float)((t.is_product ? -(double)bias[i] : squares[i] / 2) * t.scale);
  t.panels = packed.data();
  t.start = start.data();
  kernels.pack_topk(t, 0, panels, packed.data());

  std::vector<int64_t> indices(c.n * c.k, -1);
  Numbers values(c.n * c.k);
  t.indices = indices.data();
  t.values = values.data();
  kernels.topk_rows(t, 0, c.n / 3);
  kernels.topk_rows(t, c.n / 3, c.n);
  for (int64_t r = 0; r < c.n; ++r) {
    std::vector<std::pair<double, int64_t>> all(c.count);
    for (int64_t i = 0; i < c.count; ++i) all[i] = {score_of(t, &x[r * c.features], i), i};
    std::sort(all.begin(), all.end());
    for (int64_t j = 0; j < c.k; ++j) {
      const int64_t index = indices[r * c.k + j];
      CHECK(index >= 0 && index < c.count, "row %ld has code %ld", (long)r, (long)index);
      const double found = score_of(t, &x[r * c.features], index), best = all[j].first;
      // Both sums are of float64, in another order.
      const bool is_best = found == best ? index == all[j].second : std::abs(found - best) <= 1e-13 * c.features;
      CHECK(is_best, "row %ld has code %ld at %g, not %ld", (long)r, (long)index, found, (long)all[j].second);
      const double value = t.is_product ? -values[r * c.k + j] : values[r * c.k + j];
      CHECK(best == 1e300 || std::abs(value - best) <= 1e-5 * c.features, "a value of %g, not %g", value, best);
    }
  }
}

}  // namespace

void test_topk(const Kernels& kernels) {
  Random random;
  const int64_t sizes[][4] = {
      {1, 1, 1, 1},    {9, 31, 3, 4},    {20, 513, 5, 7},   {129, 40, 65, 40}, {7, 1100, 2, 600},
      {3, 512, 257, 1}, {5, 700, 16, 700}, {6, 600, 7, 100},
  };
  for (const auto& size : sizes) {
    for (const bool is_product : {false, true}) {
      for (const int64_t off : {(int64_t)0, size[1] / 2, size[1]}) {
        const Case c{size[0], size[1], size[2], size[3], is_product, off};
        Numbers x = numbers(random, c.n * c.features), codes = numbers(random, c.count * c.features);
        const Numbers bias = numbers(random, c.count);
        test_case(kernels, c, x, codes, bias);
        // Small numbers, where many scores are equal; and codes that float32 does not tell apart.
        Numbers few = codes, near = codes;
        for (float& each : few) each = std::round(each);
        for (int64_t i = 0; i < (int64_t)near.size(); ++i) near[i] = codes[i % c.features] + codes[i] * 0x1p-22f;
        Numbers whole = x;
        for (float& each : whole) each = std::round(each);
        test_case(kernels, c, whole, few, Numbers(c.count, 0.0f));
        test_case(kernels, c, x, near, Numbers(c.count, 1.0f));
      }
    }
  }
}

}  // namespace dlvae
