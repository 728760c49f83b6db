#include "operations_cpu.h"

namespace dlvae {

Tensor rotation_trick_bwd(const Tensor& grad, const Tensor& x, const Tensor& q) {
  const Rows rows = rows_of("x", x), grads = rows_of("grad", grad), targets = rows_of("q", q);
  STD_TORCH_CHECK(
      shape_of(grad) == shape_of(x) && shape_of(q) == shape_of(x), "expected grad and q of the shape of x, ",
      shape_text(x), ", got ", shape_text(grad), " and ", shape_text(q));
  const Tensor grad_x = new_like(x);
  const Rows out = rows_of("grad_x", grad_x);
  const Kernels& k = kernels();
  parallel(rows.count, 1 + 16384 / std::max<int64_t>(1, rows.features), [&](int64_t begin, int64_t end) {
    k.rotate_rows(grads, rows, targets, out, begin, end);
  });
  return grad_x;
}

}  // namespace dlvae
