// The gradient of the rotation trick for one row (Fifty et al. 2024, arXiv:2410.06424), on the CPU and on a GPU.
#pragma once

#if defined(__CUDACC__)
#define DLVAE_ANYWHERE inline __host__ __device__
#else
#define DLVAE_ANYWHERE inline __attribute__((always_inline))
#endif

namespace {

// The rotation that takes the direction of x to that of q, with the scale |q| / |x|, transposed. Let e = x / |x|, t = q
// / |q| and s = e + t. The gradient g becomes |q| / |x| (g - 2 (g.s) s / |s|^2 + 2 (g.t) e).
struct Rotation {
  float per_x, per_q, scale;  // 1 / |x|, 1 / |q| and |q| / |x|
  float along_s, along_e;     // 2 (g.s) / |s|^2 and 2 g.t

  Rotation() = default;
  // Begins with the squared norms of x and q. Norms below 1e-6 are divided by as 1e-6.
  DLVAE_ANYWHERE Rotation(float x_squares, float q_squares) {
    const float x_norm = __builtin_sqrtf(x_squares), q_norm = __builtin_sqrtf(q_squares);
    per_x = 1 / (x_norm < 1e-6f ? 1e-6f : x_norm);
    per_q = 1 / (q_norm < 1e-6f ? 1e-6f : q_norm);
    scale = q_norm * per_x;
  }
  // Returns an element of e; of s.
  template <class T>
  DLVAE_ANYWHERE T e(T x) const {
    return x * per_x;
  }
  template <class T>
  DLVAE_ANYWHERE T s(T x, T q) const {
    return x * per_x + q * per_q;
  }
  // Sets the products: |s|^2, g.s and g.t. A shorter s than 1e-6 is rounding error, of x and q in opposite directions:
  // it counts as zero.
  DLVAE_ANYWHERE void set_products(float s_squares, float grad_s, float grad_t) {
    along_s = s_squares < 1e-12f ? 0 : 2 * grad_s / s_squares;
    along_e = 2 * grad_t;
  }
  // Returns an element of the gradient of x.
  template <class T>
  DLVAE_ANYWHERE T operator()(T grad, T x, T q) const {
    return (grad - s(x, q) * along_s + e(x) * along_e) * scale;
  }
};

}  // namespace
