// The gradient of the rotation trick.
#pragma once

#include "../../rotation.h"
#include "dense_rows.h"
#include "elementwise.h"

namespace {

// Calls f(first feature, load) for every WIDTH features, where load(row) returns those of a row, and zeros beyond D.
template <class F>
DLVAE_INLINE void for_vectors(int64_t features, const F& f) {
  int64_t d = 0;
  for (; d + WIDTH <= features; d += WIDTH) f(d, [d](const float* row) { return load<Floats>(row + d); });
  if (d < features) f(d, [=](const float* row) { return load_first(row + d, features - d); });
}

// Writes the gradient of x for one row. `out` may be `grad`.
inline void rotate_row(const float* grad, const float* x, const float* q, int64_t features, float* out) {
  Floats x_squares{}, q_squares{}, s_squares{}, grad_s{}, grad_t{};
  for_vectors(features, [&](int64_t, const auto& of) {
    x_squares += of(x) * of(x);
    q_squares += of(q) * of(q);
  });
  Rotation rotation(total(x_squares), total(q_squares));
  for_vectors(features, [&](int64_t, const auto& of) {
    const Floats s = rotation.s(of(x), of(q));
    s_squares += s * s;
    grad_s += of(grad) * s;
    grad_t += of(grad) * (of(q) * rotation.per_q);
  });
  rotation.set_products(total(s_squares), total(grad_s), total(grad_t));
  for_vectors(features, [&](int64_t d, const auto& of) {
    const Floats result = rotation(of(grad), of(x), of(q));
    memcpy(out + d, &result, (features - d < WIDTH ? features - d : WIDTH) * sizeof(float));
  });
}

inline void rotate_rows(
    const Rows& grad, const Rows& x, const Rows& q, const Rows& grad_x, int64_t begin, int64_t end) {
  const int64_t features = x.features, batch = batch_of(features);
  DenseRows grads(grad, batch), sources(x, batch), targets(q, batch), to(grad_x, batch);
  for (int64_t first = begin; first < end; first += batch) {
    const int64_t last = first + batch < end ? first + batch : end;
    const float* g = grads.load(first, last);
    const float* source = sources.load(first, last);
    const float* target = targets.load(first, last);
    float* out = to.at(first);
    for (int64_t r = 0; r < last - first; ++r)
      rotate_row(g + r * grads.ld(), source + r * sources.ld(), target + r * targets.ld(), features, out + r * to.ld());
    to.store(first, last);
  }
}

}  // namespace
