// The kernels of residual quantization against plain loops.
#include <algorithm>

#include "check.h"

namespace dlvae {
namespace {

// Rows whose codes are known, so that no codebook has to be packed.
void test_quantize(const Kernels& kernels, Random& random, int64_t rows, int64_t codes, int64_t features) {
  const Numbers codebook = whole_numbers(random, codes * features, 9), x = whole_numbers(random, rows * features, 9);
  const Numbers before = whole_numbers(random, rows * features, 9);
  std::vector<Found> found(rows);
  for (Found& each : found) each = {0, random.below(codes)};
  Codebook book{};
  book.codes = codebook.data();
  book.count = codes;
  book.features = features;
  book.found = found.data();
  Numbers residuals = x, sums = before;
  std::vector<int64_t> indices(rows, -1);
  const double loss = kernels.quantize_residuals(book, residuals.data(), sums.data(), rows, indices.data());
  double expected = 0;
  for (int64_t r = 0; r < rows; ++r) {
    CHECK(indices[r] == found[r].index, "row %ld has another code", (long)r);
    for (int64_t d = 0; d < features; ++d) {
      const int64_t i = r * features + d;
      const float code = codebook[indices[r] * features + d], left = x[i] - code;
      CHECK(residuals[i] == left, "row %ld leaves %g, not %g", (long)r, residuals[i], left);
      CHECK(sums[i] == before[i] + code, "the sum of row %ld is %g", (long)r, sums[i]);
      expected += left * left;
    }
  }
  CHECK(loss == expected, "the loss is %g, not %g", loss, expected);

  // The second of two levels: indices are two apart.
  std::vector<int64_t> strided(2 * rows - 1, -1);
  Numbers left = x;
  for (int64_t r = 0; r < rows; ++r) strided[2 * r] = r % 3 == 0 ? -1 : indices[r];
  kernels.subtract_codes(codebook.data(), strided.data(), 2, rows, features, left.data());
  for (int64_t i = 0; i < rows * features; ++i)
    CHECK(left[i] == (i / features % 3 == 0 ? x[i] : residuals[i]), "row %ld is wrong", (long)(i / features));
}

// The gradient of the rotation trick in float64.
std::vector<double> rotated(const float* grad, const double* x, const double* q, int64_t features) {
  double x_norm = 0, q_norm = 0, s_norm = 0, grad_s = 0, grad_q = 0;
  for (int64_t d = 0; d < features; ++d) x_norm += x[d] * x[d], q_norm += q[d] * q[d];
  x_norm = std::sqrt(x_norm), q_norm = std::sqrt(q_norm);
  for (int64_t d = 0; d < features; ++d) {
    const double s = x[d] / x_norm + q[d] / q_norm;
    s_norm += s * s, grad_s += grad[d] * s, grad_q += grad[d] * q[d] / q_norm;
  }
  std::vector<double> out(features);
  for (int64_t d = 0; d < features; ++d) {
    const double e = x[d] / x_norm, s = e + q[d] / q_norm;
    out[d] = q_norm / x_norm * (grad[d] - 2 * grad_s / s_norm * s + 2 * grad_q * e);
  }
  return out;
}

void test_gradient(
    const Kernels& kernels, Random& random, int64_t rows, int64_t levels, int64_t features, Form form,
    ResidualGradient gradient) {
  constexpr int64_t CODES = 5;
  const bool rotates = gradient == ResidualGradient::rotation || gradient == ResidualGradient::rotation_each;
  // Whole numbers are exact in every form; positive ones keep vectors and codes away from opposite directions.
  Numbers codebooks = whole_numbers(random, levels * CODES * features, 9),
          x = whole_numbers(random, rows * features, 9);
  for (Numbers* each : {&codebooks, &x})
    for (float& value : *each) value = rotates ? std::abs(value) + 1 : value;
  const Numbers grad = whole_numbers(random, rows * features, 9), weights = whole_numbers(random, levels, 3);
  std::vector<int64_t> indices(rows * levels);
  for (int64_t& index : indices) index = random.below(CODES + 1) - 1;
  std::fill_n(indices.begin(), levels, -1);  // the first row has no code
  const Tensor from(kernels, form, x, rows, features), grads(kernels, form, grad, rows, features);
  const Tensor to(kernels, form, Numbers(rows * features, NAN), rows, features);
  const ResidualBackward task{codebooks.data(), levels,    CODES,      indices.data(), weights.data(),
                              gradient,         from.rows, grads.rows, to.rows};
  for (int64_t row = 0; row < rows; row += 70) kernels.residual_grad_rows(task, row, std::min(row + 70, rows));
  const Numbers found = to.values();
  for (int64_t r = 0; r < rows; ++r) {
    const float* of_row = &grad[r * features];
    std::vector<double> residual(&x[r * features], &x[r * features] + features), expected(features), sum(features);
    const std::vector<double> start = residual;
    int64_t ran = 0;
    for (int64_t level = 0; level < levels; ++level) {
      const int64_t index = indices[r * levels + level];
      if (index < 0) continue;
      ++ran;
      const float* code = &codebooks[(level * CODES + index) * features];
      const std::vector<double> wide(code, code + features);
      if (gradient == ResidualGradient::rotation_each) {
        const std::vector<double> turned = rotated(of_row, residual.data(), wide.data(), features);
        for (int64_t d = 0; d < features; ++d) expected[d] += turned[d];
      }
      for (int64_t d = 0; d < features; ++d) {
        residual[d] -= code[d], sum[d] += code[d];
        expected[d] += weights[level] * residual[d];
      }
    }
    if (gradient == ResidualGradient::rotation && ran > 0) {
      const std::vector<double> turned = rotated(of_row, start.data(), sum.data(), features);
      for (int64_t d = 0; d < features; ++d) expected[d] += turned[d];
    }
    const int64_t times = gradient == ResidualGradient::each ? ran : ran > 0 && !rotates;
    double size = 1;
    for (int64_t d = 0; d < features; ++d) expected[d] += times * of_row[d], size += std::abs(expected[d]);
    for (int64_t d = 0; d < features; ++d) {
      const double error = std::abs(found[r * features + d] - expected[d]);
      const double allowed = (rotates ? 1e-4 * size : 0) + rounding_of(form, expected[d]);
      CHECK(error <= allowed, "row %ld is %g, not %g", (long)r, found[r * features + d], expected[d]);
    }
  }
}

}  // namespace

void test_residual(const Kernels& kernels) {
  Random random;
  for (int64_t features : Sizes{1, 7, 16, 33, 70})
    for (int64_t rows : Sizes{1, 5, BLOCK}) test_quantize(kernels, random, rows, 11, features);
  for (Form form : FORMS)
    for (int64_t features : Sizes{1, 16, 37})
      for (ResidualGradient gradient : {ResidualGradient::once, ResidualGradient::each, ResidualGradient::rotation})
        test_gradient(kernels, random, 90, 3, features, form, gradient);
  // With one level, a residual has no opposite direction to its code.
  test_gradient(kernels, random, 90, 1, 37, PLAIN, ResidualGradient::rotation_each);
}

}  // namespace dlvae
