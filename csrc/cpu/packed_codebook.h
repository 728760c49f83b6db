#pragma once

#include <optional>

#include "tensors_cpu.h"

namespace dlvae {

// A codebook [K, D], measured and packed for the searches of one call. For at most FEW_ROWS rows x, it holds their
// nearest codes instead, which one pass over the unpacked codes finds.
class PackedCodebook {
 public:
  // codes: contiguous [K, D], which outlive this object.
  PackedCodebook(const Kernels& kernels, const float* codes, int64_t count, int64_t features, const Rows& x);
  const Codebook& book() const { return book_; }

 private:
  void find(const Kernels& kernels, const Rows& x);
  void measure(const Kernels& kernels);
  bool centre();
  void leave_out_repeated();
  void pack(const Kernels& kernels);

  Codebook book_{};
  Array<Found> found_;
  Array<float> centre_, centred_, peaks_, losses_, start_;
  Array<double> norms_;
  Array<uint32_t> hashes_, words_;
};

// The heads of one call, each with its vectors and its packed codebook: x [..., H, D] with codebook [H, K, D]. Vectors
// x [..., D] with codebook [K, D] are one head.
class Heads {
 public:
  Heads(const Kernels& kernels, const Tensor& x, const Tensor& codebook);
  int64_t count() const { return count_; }
  const Codebook& book(int64_t head) const { return books_[head]->book(); }

  // The rows of one head of x, or of a tensor of its shape.
  Rows rows(const char* name, const Tensor& tensor, int64_t head) const;

  // The number of rows of each head, and of their blocks.
  int64_t num_rows() const { return num_rows_; }
  int64_t num_blocks() const { return (num_rows_ + BLOCK - 1) / BLOCK; }

  // Calls f(head, begin, end) in parallel for rows [begin, end) of all heads; begin is a multiple of BLOCK.
  template <class F>
  void for_rows(const F& f) const {
    const int64_t blocks = num_blocks();
    parallel(count_ * blocks, 1, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t head = begin / blocks, last = std::min(end, (head + 1) * blocks);
        f(head, (begin - head * blocks) * BLOCK, std::min((last - head * blocks) * BLOCK, num_rows_));
        begin = last;
      }
    });
  }

 private:
  bool exist_;
  int64_t count_, num_rows_;
  std::optional<Matrix> codes_;  // [H * K, D]
  std::vector<std::unique_ptr<PackedCodebook>> books_;
};

}  // namespace dlvae
