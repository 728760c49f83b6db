// Residual quantization: a level quantizes what the levels before it left of a row.
#pragma once

#include "../residual.h"
#include "rotation_kernel.h"
#include "search_kernel.h"

namespace {

using dlvae::ResidualBackward;
using dlvae::ResidualGradient;

// Subtracts a code from the residual and adds it to the sum of codes. Returns |residual|^2.
inline double move_code(const float* code, int64_t features, float* residual, float* sum) {
  Floats squares = {};
  float rest = 0;
  int64_t d = 0;
  for (; d + WIDTH <= features; d += WIDTH) {
    const Floats value = load<Floats>(code + d), left = load<Floats>(residual + d) - value;
    squares += left * left;
    store(residual + d, left);
    store(sum + d, load<Floats>(sum + d) + value);
  }
  for (; d < features; ++d) {
    residual[d] -= code[d];
    sum[d] += code[d];
    rest += residual[d] * residual[d];
  }
  const float square = total(squares) + rest;
  // The sum of squares may overflow float32 although the mean over all rows does not.
  return is_finite(square) ? square : squared_norm(residual, features);
}

// Finds the nearest codes of residuals [count, D], at most BLOCK; each is subtracted from its residual and added to its
// row of sums [count, D]. Returns the sum of the squares of what is left.
inline double quantize_residuals(const Codebook& book, float* residuals, float* sums, int64_t count, int64_t* indices) {
  const int64_t features = book.features;
  search_rows(book, dlvae::contiguous_rows(residuals, count, features), 0, count, 1, indices, nullptr);
  double loss = 0;
  for (int64_t r = 0; r < count; ++r)
    loss += move_code(book.codes + indices[r] * features, features, residuals + r * features, sums + r * features);
  return loss;
}

// Subtracts from each of `count` rows its code. Indices are `stride` apart; a negative one stands for no code.
inline void subtract_codes(
    const float* codebook, const int64_t* indices, int64_t stride, int64_t count, int64_t features, float* rows) {
  for (int64_t r = 0; r < count; ++r, rows += features) {
    const int64_t index = indices[r * stride];
    if (index < 0) continue;
    const float* code = codebook + index * features;
    for (int64_t d = 0; d < features; ++d) rows[d] -= code[d];
  }
}

// Computes the gradient of one row x. `residual`, `sum` and `rotated` are scratch memory for a row each.
inline void residual_grad_row(
    const ResidualBackward& task, const int64_t* indices, const float* x, const float* grad, float* residual,
    float* sum, float* rotated, float* out) {
  const int64_t features = task.x.features;
  int64_t ran = 0;
  memcpy(residual, x, features * sizeof(float));
  memset(sum, 0, features * sizeof(float));
  memset(out, 0, features * sizeof(float));
  const auto add_rotated = [&](const float* from, const float* to) {
    rotate_row(grad, from, to, features, rotated);
    for (int64_t d = 0; d < features; ++d) out[d] += rotated[d];
  };
  for (int64_t level = 0; level < task.levels; ++level) {
    if (indices[level] < 0) continue;
    ++ran;
    const float* code = task.codebooks + (level * task.codes + indices[level]) * features;
    if (task.gradient == ResidualGradient::rotation_each) add_rotated(residual, code);
    const float weight = task.weights[level];
    for (int64_t d = 0; d < features; ++d) {
      residual[d] -= code[d];
      sum[d] += code[d];
      out[d] += weight * residual[d];
    }
  }
  if (ran == 0 || task.gradient == ResidualGradient::rotation_each) return;
  if (task.gradient == ResidualGradient::rotation) return add_rotated(x, sum);
  const float times = task.gradient == ResidualGradient::each ? (float)ran : 1;
  for (int64_t d = 0; d < features; ++d) out[d] += times * grad[d];
}

inline void residual_grad_rows(const ResidualBackward& task, int64_t begin, int64_t end) {
  const int64_t features = task.x.features, batch = batch_of(features);
  DenseRows x(task.x, batch), grads(task.grad, batch), out(task.grad_x, batch);
  Buffer<float> residual(features), sum(features), rotated(features);
  for (int64_t first = begin; first < end; first += batch) {
    const int64_t last = first + batch < end ? first + batch : end;
    const float* from = x.load(first, last);
    const float* grad = grads.load(first, last);
    float* to = out.at(first);
    for (int64_t row = first; row < last; ++row, from += x.ld(), grad += grads.ld(), to += out.ld())
      residual_grad_row(task, task.indices + row * task.levels, from, grad, residual, sum, rotated, to);
    out.store(first, last);
  }
}

}  // namespace
