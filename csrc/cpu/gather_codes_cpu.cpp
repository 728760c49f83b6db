#include "indices.h"
#include "operations_cpu.h"
#include "segment_sum_cpu.h"

namespace dlvae {

Tensor gather_codes_fwd(const Tensor& codebook, const Tensor& indices) {
  check_device("codebook", codebook);
  type_of("codebook", codebook);
  STD_TORCH_CHECK(codebook.dim() == 2, "expected codebook of shape [K, D], got ", shape_text(codebook));
  const Indices which("indices", indices);
  const int64_t num_codes = codebook.size(0), size = codebook.element_size(), row_bytes = codebook.size(1) * size;
  const bool has_rows = codebook.size(1) == 1 || codebook.stride(1) == 1;
  const Tensor codes = has_rows ? codebook : torch::stable::contiguous(codebook);
  std::vector<int64_t> shape = shape_of(indices);
  shape.push_back(codebook.size(1));
  const Tensor out = new_tensor(codebook, shape, codebook.scalar_type());
  const char* from = data_of<const char>(codes);
  const int64_t stride = codes.stride(0) * size;
  const Kernels& k = kernels();
  char* to = data_of<char>(out);
  parallel(which.count, 1 + 32768 / std::max<int64_t>(1, row_bytes), [&](int64_t begin, int64_t end) {
    constexpr int64_t STEP = 1024;
    for (; begin < end; begin += STEP) {
      const int64_t last = std::min(begin + STEP, end);
      which.check(begin, last, num_codes);
      k.copy_rows(from, stride, which.data, begin, last, row_bytes, to);
    }
  });
  return out;
}

Tensor gather_codes_bwd(const Tensor& grad, const Tensor& indices, int64_t num_codes, int64_t num_heads) {
  STD_TORCH_CHECK(num_heads == 1, "expected num_heads to be 1, got ", num_heads);
  const Rows rows = rows_of("grad", grad);
  const Indices codes("indices", indices);
  STD_TORCH_CHECK(
      codes.count == rows.count, "expected one index for each of the ", rows.count, " vectors of grad, got ",
      codes.count);
  STD_TORCH_CHECK(num_codes >= 1, "expected num_codes to be at least 1, got ", num_codes);
  const Tensor sums = new_tensor(grad, {num_codes, rows.features});
  const SortedPairs pairs(codes, 1, num_codes, nullptr, nullptr);
  segment_sum(rows, pairs, 1, 1, data_of<float>(sums), rows.features);
  return sums;
}

}  // namespace dlvae
