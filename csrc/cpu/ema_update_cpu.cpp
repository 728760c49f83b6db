#include <atomic>
#include <cmath>

#include "operations_cpu.h"
#include "segment_sum_cpu.h"

namespace dlvae {
namespace {

// Sets a flag for each row that holds NaN or infinity.
void find_rows_not_finite(const Rows& rows, bool* is_not_finite) {
  const Kernels& k = kernels();
  parallel(rows.count, 1 + 16384 / rows.features, [&](int64_t begin, int64_t end) {
    const Array<float> row = new_array<float>(rows.features);
    for (int64_t i = begin; i < end; ++i) {
      k.load_rows(rows, i, i + 1, row.get(), rows.features);
      is_not_finite[i] = !all_finite(row.get(), rows.features);
    }
  });
}

// The rows [K, 1] of a tensor [K].
Rows column_of(const char* name, const Tensor& tensor) { return rows_of(name, torch::stable::unsqueeze(tensor, -1)); }

void check_state(const char* name, const Tensor& tensor, const std::vector<int64_t>& shape) {
  check_device(name, tensor);
  STD_TORCH_CHECK(
      tensor.scalar_type() == ScalarType::Float, "expected ", name, " of dtype float32, got ",
      torch::headeronly::toString(tensor.scalar_type()));
  STD_TORCH_CHECK(
      shape_of(tensor) == shape, "expected ", name, " of the shape that codebook requires, got ", shape_text(tensor));
  for (int64_t i = 0; i < tensor.dim(); ++i)
    STD_TORCH_CHECK(
        tensor.size(i) <= 1 || tensor.stride(i) != 0, "expected ", name,
        " with memory for each element, which is updated in place, got an expanded tensor: clone it");
}

}  // namespace

Tensor ema_statistics(const Tensor& x, const Tensor& indices, int64_t num_codes, int64_t num_heads) {
  const Rows rows = rows_of("x", x);
  const Indices codes("indices", indices, "x", rows);
  check_codes(num_codes, num_heads, rows);
  const int64_t all_codes = num_heads * num_codes, features = rows.features, ld = features + 1;
  const Tensor statistics = new_tensor(x, {all_codes, ld});
  float* out = data_of<float>(statistics);
  std::atomic<bool> is_finite{true};
  const auto sum = [&](const bool* left_out) {
    const SortedPairs pairs(codes, 1, num_codes, num_heads, nullptr, left_out);
    segment_sum(rows, pairs, 1, 1, out, ld);
    parallel(all_codes, 1 + 32768 / ld, [&](int64_t begin, int64_t end) {
      for (int64_t code = begin; code < end; ++code) {
        const int64_t count = pairs.count_of(code);
        out[code * ld + features] = static_cast<float>(count);
        if (count > 0 && !all_finite(out + code * ld, features)) is_finite = false;
      }
    });
  };
  sum(nullptr);
  // Sums of finite rows are almost always finite, so the rows are examined only if a sum is not.
  if (!is_finite) {
    const Array<bool> left_out = new_array<bool>(rows.count);
    find_rows_not_finite(rows, left_out.get());
    sum(left_out.get());
  }
  return statistics;
}

void ema_step(
    const Tensor& codebook, const Tensor& cluster_size, const Tensor& embed_sum, const Tensor& statistics, double decay,
    double epsilon) {
  const int64_t dim = codebook.dim();
  STD_TORCH_CHECK(dim == 2 || dim == 3, "expected codebook of shape [K, D] or [H, K, D], got ", shape_text(codebook));
  const int64_t num_codes = codebook.size(dim - 2), features = codebook.size(dim - 1);
  const int64_t num_heads = dim == 3 ? codebook.size(0) : 1, all_codes = num_heads * num_codes;
  const std::vector<int64_t> batch_shape = shape_with(codebook, {features + 1});
  check_state("codebook", codebook, shape_of(codebook));
  check_state("cluster_size", cluster_size, shape_with(codebook, {}));
  check_state("embed_sum", embed_sum, shape_of(codebook));
  STD_TORCH_CHECK(
      shape_of(statistics) == batch_shape, "expected statistics of shape [..., K, D + 1] = ", shape_text(batch_shape),
      ", got ", shape_text(statistics));
  const Kernels& k = kernels();
  const float weight = static_cast<float>(1 - decay);

  Tensor all = statistics;
  const Tensor last = torch::stable::narrow(all, dim - 1, features, 1);
  const Matrix counts("statistics", last);
  const Rows sizes_view = column_of("cluster_size", cluster_size);
  const Array<float> sizes = new_array<float>(all_codes);
  k.load_rows(sizes_view, 0, all_codes, sizes.get(), 1);
  for (int64_t code = 0; code < all_codes; ++code) {
    const float change = counts.data[code] - sizes[code];
    sizes[code] = weight < 0.5f ? sizes[code] + weight * change : counts.data[code] - (1 - weight) * change;
  }
  k.store_rows(sizes_view, 0, all_codes, sizes.get(), 1);
  // From here on, sizes[code] is the smoothed divisor of the code's sum. It is 0 for a code without vectors, which
  // stays as it is: smoothing would pull it towards the origin at every step.
  for (int64_t first = 0; first < all_codes; first += num_codes) {
    double total = 0;  // of one head
    for (int64_t code = first; code < first + num_codes; ++code) total += sizes[code];
    const double share = total / (total + static_cast<double>(num_codes) * epsilon);
    for (int64_t code = first; code < first + num_codes; ++code) {
      const bool is_used = counts.data[code] > 0 && sizes[code] > 0;
      sizes[code] = is_used ? static_cast<float>((sizes[code] + epsilon) * share) : 0;
    }
  }
  const Rows codes = rows_of("codebook", codebook), sums = rows_of("embed_sum", embed_sum);
  const Rows batch = rows_of("statistics", statistics);
  parallel(all_codes, 1 + 16384 / std::max<int64_t>(1, features), [&](int64_t begin, int64_t end) {
    k.ema_rows(codes, sums, batch, sizes.get(), weight, begin, end);
  });
}

}  // namespace dlvae
