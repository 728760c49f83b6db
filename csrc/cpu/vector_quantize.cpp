// Search, codes, losses and counts in one pass over x; and their gradients.
#include "operations.h"
#include "packed_codebook.h"

namespace dlvae {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> vector_quantize_fwd(
    const Tensor& x, const Tensor& codebook, bool need_error, std::string precision) {
  const Rows rows = rows_of("x", x);
  STD_TORCH_CHECK(codebook.dim() == 2, "codebook has ", codebook.dim(), " dimensions; it needs [K, D]");
  STD_TORCH_CHECK(rows.features == codebook.size(1), "x has D = ", rows.features, "; it needs that of codebook, ", codebook.size(1));
  const Tensor quantized = torch::stable::empty_like(x);
  const Tensor error = need_error ? torch::stable::empty_like(x) : new_tensor(x, {0}, x.scalar_type());
  const Tensor indices = new_tensor(x, shape_with(x, {}), ScalarType::Long);
  const Tensor counts = new_tensor(x, {codebook.size(0)}, ScalarType::Long);
  const Tensor codebook_loss = new_tensor(x, {}), commitment_loss = new_tensor(x, {});
  int64_t* index = static_cast<int64_t*>(indices.data_ptr());
  int64_t* count = static_cast<int64_t*>(counts.data_ptr());
  double loss = 0;
  if (rows.count > 0) {
    const Kernels& k = kernels();
    const PackedCodebook packed(k, codebook);
    const Rows quantized_rows = rows_of("quantized", quantized), error_rows = need_error ? rows_of("error", error) : Rows{};
    const int64_t blocks = (rows.count + BLOCK - 1) / BLOCK;
    const Array<double> losses = new_array<double>(blocks);
    parallel(blocks, 1, [&](int64_t begin, int64_t end) {
      const int64_t last = std::min(end * BLOCK, rows.count);
      k.quantize_rows(packed.book(), rows, begin * BLOCK, last, index, quantized_rows, error_rows, losses.get());
    });
    // In one order, whatever the number of threads.
    for (int64_t b = 0; b < blocks; ++b) loss += losses[b];
    loss /= static_cast<double>(rows.count * rows.features);
  }
  std::fill(count, count + codebook.size(0), 0);
  for (int64_t r = 0; r < rows.count; ++r) ++count[index[r]];
  *static_cast<float*>(codebook_loss.data_ptr()) = *static_cast<float*>(commitment_loss.data_ptr()) = static_cast<float>(loss);
  return {quantized, indices, codebook_loss, commitment_loss, counts, error};
}

}  // namespace dlvae
