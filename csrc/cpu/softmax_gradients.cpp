#include "softmax_gradients.h"

#include <limits>

namespace dlvae {
namespace {

// The backward pass holds this many bytes of the gradient of the logits at once. If K is large, the smallest superblock
// of rows may take more.
constexpr int64_t SUPERBLOCK_BYTES = 8 << 20;
constexpr int64_t SMALLEST_SUPERBLOCK = 256;

}  // namespace

SoftmaxWeight::SoftmaxWeight(
    const Tensor& like, const float* weight, int64_t codes, int64_t features, const float* bias)
    : codes_(codes), features_(features) {
  const Kernels& all = kernels();
  const int64_t panels = (codes + all.panel - 1) / all.panel;
  start_.assign(panels * all.panel, -std::numeric_limits<float>::infinity());
  if (bias == nullptr) {
    std::fill_n(start_.begin(), codes, 0.0f);
  } else {
    std::copy_n(bias, codes, start_.begin());
  }
  panels_ = new_tensor(like, {panels, features, all.panel});
  float* const to = data_of<float>(panels_);
  parallel(panels, 1 + 16384 / (features * all.panel), [&](int64_t begin, int64_t end) {
    all.pack_weight(weight, codes, features, begin, end, to);
  });
}

void SoftmaxWeight::set(KeptSoftmax& softmax) const {
  softmax.codes = codes_;
  softmax.features = features_;
  softmax.panels = data_of<float>(panels_);
  softmax.start = start_.data();
}

SoftmaxGradients::SoftmaxGradients(
    const Tensor& x, KeptSoftmaxBackward& backward, const float* weight, bool need_x, bool need_weight, bool need_bias)
    : b_(backward) {
  const Kernels& all = kernels();
  const KeptSoftmax& s = b_.forward;
  const int64_t panels = (s.features + all.panel - 1) / all.panel;
  tiles_ = (s.codes + all.rows - 1) / all.rows;
  grad_x = new_tensor(x, need_x ? shape_of(x) : std::vector<int64_t>{0});
  if (need_x) {
    b_.grad_x = rows_of("grad_x", grad_x);
    columns_ = new_tensor(x, {panels, s.codes, all.panel});
    b_.columns = data_of<float>(columns_);
    parallel(panels, 1 + 16384 / (s.codes * all.panel), [&](int64_t begin, int64_t end) {
      all.pack_weight_columns(weight, s.codes, s.features, begin, end, data_of<float>(columns_));
    });
  }
  b_.needs_weight = need_weight;
  b_.needs_bias = need_bias;
  const int64_t fitting = SUPERBLOCK_BYTES / 4 / s.codes / SMALLEST_SUPERBLOCK * SMALLEST_SUPERBLOCK;
  superblock_ = std::min(std::max(fitting, SMALLEST_SUPERBLOCK), std::max<int64_t>(s.x.count, 1));
  // Tiles a power of two apart would map to the same sets of the caches.
  b_.room = superblock_ + 4;
  if (need_weight || need_bias) {
    logits_ = new_tensor(x, {tiles_, b_.room, all.rows});
    b_.logits = data_of<float>(logits_);
  }
  if (need_weight) {
    packed_rows_ = new_tensor(x, {panels, b_.room, all.panel});
    total_ = new_tensor(x, {panels, tiles_, all.rows, all.panel});
    torch::stable::zero_(total_);
    b_.rows = data_of<float>(packed_rows_);
    b_.weight = data_of<float>(total_);
  }
  grad_bias.resize(need_bias ? tiles_ * all.rows : 0);
  b_.bias = grad_bias.data();
}

Tensor SoftmaxGradients::grad_weight() const {
  const int64_t codes = b_.forward.codes, features = b_.forward.features;
  const Tensor grad =
      new_tensor(grad_x, b_.needs_weight ? std::vector<int64_t>{codes, features} : std::vector<int64_t>{0});
  if (b_.needs_weight) {
    parallel(codes, 1 + 16384 / features, [&](int64_t begin, int64_t end) {
      kernels().unpack_weight(b_, begin, end, data_of<float>(grad));
    });
  }
  return grad;
}

Tensor adjacent(const char* name, const Tensor& tensor, int64_t numel) {
  check_device(name, tensor);
  STD_TORCH_CHECK(
      tensor.scalar_type() == ScalarType::Float, "expected ", name, " of dtype float32, got ",
      torch::headeronly::toString(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.numel() == numel, "expected ", name, " of ", numel, " elements, got ", tensor.numel());
  return torch::stable::contiguous(tensor);
}

}  // namespace dlvae
