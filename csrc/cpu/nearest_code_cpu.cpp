// The index of the nearest code of each row. The result is exact for each value of `precision`.
#include <atomic>

#include "operations_cpu.h"
#include "packed_codebook.h"

namespace dlvae {
namespace {

// Writes indices and, unless null, squared distances. Returns the number of rows that were searched a second time.
int64_t search(const Tensor& x, const Tensor& codebook, int64_t* indices, float* distances) {
  const Kernels& k = kernels();
  const Heads heads(k, x, codebook);
  std::atomic<int64_t> uncertain{0};
  heads.for_rows([&](int64_t head, int64_t begin, int64_t end) {
    float* const distance = distances == nullptr ? nullptr : distances + head;
    uncertain +=
        k.search_rows(heads.book(head), heads.rows("x", x, head), begin, end, heads.count(), indices + head, distance);
  });
  return uncertain;
}

}  // namespace

std::tuple<Tensor, Tensor> nearest_code(
    const Tensor& x, const Tensor& codebook, bool return_distance, std::string precision) {
  const Tensor indices = new_tensor(x, shape_with(x, {}), ScalarType::Long);
  const Tensor distances = new_tensor(x, return_distance ? shape_with(x, {}) : std::vector<int64_t>{0});
  float* distance = return_distance ? data_of<float>(distances) : nullptr;
  search(x, codebook, data_of<int64_t>(indices), distance);
  return {indices, distances};
}

int64_t uncertain_rows(const Tensor& x, const Tensor& codebook) {
  const Tensor indices = new_tensor(x, shape_with(x, {}), ScalarType::Long);
  return search(x, codebook, data_of<int64_t>(indices), nullptr);
}

}  // namespace dlvae
