#include <cstring>

#include "indices.h"
#include "operations_cpu.h"

namespace dlvae {
namespace {

// Zeroes each row and writes its ones while the row is in the cache.
template <class Element>
void write_rows(
    const int64_t* indices, int64_t k, int64_t codes, Element one, Element* rows, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    Element* to = rows + row * codes;
    std::memset(to, 0, codes * sizeof(Element));
    for (int64_t j = 0; j < k; ++j)
      if (indices[row * k + j] >= 0) to[indices[row * k + j]] = one;
  }
}

template <class Element>
void write(const Indices& indices, int64_t k, int64_t codes, const Tensor& one, const Tensor& out) {
  Element bits;
  std::memcpy(&bits, one.data_ptr(), sizeof(Element));
  Element* rows = data_of<Element>(out);
  parallel(out.size(0), 1 + 32768 / (codes * sizeof(Element)), [&](int64_t begin, int64_t end) {
    indices.check(begin * k, end * k, codes);
    write_rows(indices.data, k, codes, bits, rows, begin, end);
  });
}

struct Complex128 {
  uint64_t parts[2];
};

}  // namespace

Tensor one_hot(const Tensor& indices, int64_t num_codes, ScalarType dtype) {
  STD_TORCH_CHECK(
      indices.dim() == 1 || indices.dim() == 2, "expected indices of shape [N] or [N, k], got ", shape_text(indices));
  STD_TORCH_CHECK(num_codes >= 1, "expected num_codes to be at least 1, got ", num_codes);
  const Indices ones("indices", indices, -1);
  const int64_t k = indices.dim() == 2 ? indices.size(1) : 1;
  const Tensor out = new_tensor(indices, {indices.size(0), num_codes}, dtype);
  // torch provides the bits of a 1 of any type.
  const Tensor one = torch::stable::fill_(new_tensor(indices, {1}, dtype), 1);
  switch (out.element_size()) {
    case 1: write<uint8_t>(ones, k, num_codes, one, out); break;
    case 2: write<uint16_t>(ones, k, num_codes, one, out); break;
    case 4: write<uint32_t>(ones, k, num_codes, one, out); break;
    case 8: write<uint64_t>(ones, k, num_codes, one, out); break;
    default:
      STD_TORCH_CHECK(
          out.element_size() == 16, "expected a dtype of 1, 2, 4, 8 or 16 bytes, got ", out.element_size(), " bytes");
      write<Complex128>(ones, k, num_codes, one, out);
  }
  return out;
}

}  // namespace dlvae
