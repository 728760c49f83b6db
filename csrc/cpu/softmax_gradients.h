// The memory of the backward pass of a softmax, and its loop over superblocks of rows.
#pragma once

#include "operations_cpu.h"

namespace dlvae {

// The weight [K, D] and bias of a softmax in the form that the kernels read.
class SoftmaxWeight {
 public:
  // weight: contiguous [codes, features]; bias: [codes], or null for zeros.
  SoftmaxWeight(const Tensor& like, const float* weight, int64_t codes, int64_t features, const float* bias);
  // Sets the fields of the softmax that hold the weight.
  void set(KeptSoftmax& softmax) const;

 private:
  int64_t codes_, features_;
  Tensor panels_;
  std::vector<float> start_;
};

class SoftmaxGradients {
 public:
  // Sets the fields of `backward` besides those of `forward`, which are set before, and `grad`.
  SoftmaxGradients(
      const Tensor& x, KeptSoftmaxBackward& backward, const float* weight, bool need_x, bool need_weight,
      bool need_bias);
  // Calls rows(origin, begin, end) for all rows, superblock by superblock, and adds up the gradients of weight and bias.
  template <class F>
  void run(const F& rows);

  Tensor grad_x;  // [..., D], or empty
  // Returns the gradient of the weight [K, D], or an empty tensor.
  Tensor grad_weight() const;
  std::vector<double> grad_bias;  // [K and more], or empty

 private:
  KeptSoftmaxBackward& b_;
  int64_t tiles_, superblock_;
  Tensor columns_, logits_, packed_rows_, total_;
};

template <class F>
void SoftmaxGradients::run(const F& rows) {
  const Kernels& all = kernels();
  const int64_t count = b_.forward.x.count;
  for (int64_t origin = 0; origin < count; origin += superblock_) {
    const int64_t n = std::min(superblock_, count - origin);
    parallel(n, all.panel, [&](int64_t begin, int64_t end) { rows(origin, origin + begin, origin + end); });
    if (!b_.needs_weight && !b_.needs_bias) continue;
    parallel(tiles_, 1, [&](int64_t begin, int64_t end) { all.kept_softmax_grad_codes(b_, n, begin, end); });
  }
}

// Returns a contiguous float32 tensor of the forward pass after checking its type and size.
Tensor adjacent(const char* name, const Tensor& tensor, int64_t numel);

}  // namespace dlvae
