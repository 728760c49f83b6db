#include "indices.h"
#include "operations_cpu.h"
#include "segment_sum_cpu.h"

namespace dlvae {

Tensor gather_codes_fwd(const Tensor& codebook, const Tensor& indices) {
  check_device("codebook", codebook);
  type_of("codebook", codebook);
  const int64_t dim = codebook.dim();
  STD_TORCH_CHECK(dim == 2 || dim == 3, "expected codebook of shape [K, D] or [H, K, D], got ", shape_text(codebook));
  const bool has_heads = dim == 3;
  STD_TORCH_CHECK(
      !has_heads || (indices.dim() >= 1 && indices.size(indices.dim() - 1) == codebook.size(0)),
      "expected indices of shape [..., H] for codebook ", shape_text(codebook), ", got ", shape_text(indices));
  const Indices which("indices", indices, -1);
  const int64_t num_codes = codebook.size(dim - 2), features = codebook.size(dim - 1);
  const int64_t size = codebook.element_size(), row_bytes = features * size;
  const bool has_rows = features == 1 || codebook.stride(dim - 1) == 1;
  const Tensor codes = has_rows ? codebook : torch::stable::contiguous(codebook);
  std::vector<int64_t> shape = shape_of(indices);
  shape.push_back(features);
  const Tensor out = new_tensor(codebook, shape, codebook.scalar_type());
  const CodeRows rows{
      data_of<const char>(codes), codes.stride(dim - 2) * size, has_heads ? codes.size(0) : 1,
      has_heads ? codes.stride(0) * size : 0, row_bytes};
  const Kernels& k = kernels();
  char* to = data_of<char>(out);
  parallel(which.count, 1 + 32768 / std::max<int64_t>(1, row_bytes), [&](int64_t begin, int64_t end) {
    constexpr int64_t STEP = 1024;
    for (; begin < end; begin += STEP) {
      const int64_t last = std::min(begin + STEP, end);
      which.check(begin, last, num_codes);
      k.copy_rows(rows, which.data, begin, last, to);
    }
  });
  return out;
}

Tensor gather_codes_bwd(const Tensor& grad, const Tensor& indices, int64_t num_codes, int64_t num_heads) {
  const Rows rows = rows_of("grad", grad);
  const Indices codes("indices", indices, "grad", rows);
  check_codes(num_codes, num_heads, rows);
  const Tensor sums = new_tensor(grad, {num_heads * num_codes, rows.features});
  const SortedPairs pairs(codes, 1, num_codes, num_heads, nullptr, nullptr);
  segment_sum(rows, pairs, 1, 1, data_of<float>(sums), rows.features);
  return sums;
}

}  // namespace dlvae
