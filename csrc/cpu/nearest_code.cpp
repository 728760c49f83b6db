// The index of the nearest code of each row, exact whatever `precision` asks for.
#include "operations.h"
#include "packed_codebook.h"

std::tuple<dlvae::Tensor, dlvae::Tensor> dlvae::nearest_code(
    const Tensor& x, const Tensor& codebook, bool return_distance, std::string precision) {
  const Rows rows = rows_of("x", x);
  STD_TORCH_CHECK(codebook.dim() == 2, "codebook has ", codebook.dim(), " dimensions; it needs [K, D]");
  STD_TORCH_CHECK(rows.features == codebook.size(1), "x has D = ", rows.features, "; it needs that of codebook, ", codebook.size(1));
  const Tensor indices = new_tensor(x, shape_with(x, {}), ScalarType::Long);
  const Tensor distances = new_tensor(x, return_distance ? shape_with(x, {}) : std::vector<int64_t>{0});
  if (rows.count == 0) return {indices, distances};
  const Kernels& k = kernels();
  const PackedCodebook packed(k, codebook);
  int64_t* index = static_cast<int64_t*>(indices.data_ptr());
  float* distance = return_distance ? static_cast<float*>(distances.data_ptr()) : nullptr;
  parallel((rows.count + BLOCK - 1) / BLOCK, 1, [&](int64_t begin, int64_t end) {
    k.search_rows(packed.book(), rows, begin * BLOCK, std::min(end * BLOCK, rows.count), index, distance);
  });
  return {indices, distances};
}
