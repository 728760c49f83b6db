#include "operations_cpu.h"
#include "segment_sum_cpu.h"

namespace dlvae {
namespace {

// The size of a dictionary that stays in a core's cache.
constexpr int64_t NEAR_BYTES = 1 << 20;

// The dictionary as contiguous float32 rows. If it must be converted and has more atoms than there are indices, only
// the atoms that occur are converted.
class Kept {
 public:
  Kept(const Tensor& dictionary, const Indices& indices, int64_t k)
      : indices_(indices),
        rows_(rows_of("dictionary", dictionary)),
        is_packed_(!is_contiguous(rows_) && indices.count < rows_.count),
        numbers_(new_array<int64_t>(is_packed_ ? indices.count : 0)),
        packed_(new_array<float>(is_packed_ ? indices.count * rows_.features : 0)) {
    atoms.features = rows_.features;
    atoms.rows = k == 0 ? 0 : indices.count / k;
    atoms.k = k;
    if (!is_packed_) {
      whole_.emplace("dictionary", dictionary);
      atoms.dictionary = whole_->data;
      atoms.indices = indices.data;
      atoms.is_far = rows_.count * rows_.features * (int64_t)sizeof(float) > NEAR_BYTES;
      return;
    }
    const Kernels& table = kernels();
    parallel(indices.count, 1 + 16384 / rows_.features, [&](int64_t begin, int64_t end) {
      indices.check(begin, end, rows_.count);
      for (int64_t i = begin; i < end; ++i) {
        numbers_[i] = i;
        const int64_t atom = indices.data[i];
        table.load_rows(rows_, atom, atom + 1, packed_.get() + i * rows_.features, rows_.features);
      }
    });
    atoms.dictionary = packed_.get();
    atoms.indices = numbers_.get();
    atoms.is_far = false;
  }
  Atoms atoms{};

  // Calls f(begin, end) in parallel for all rows, a few at a time, after checking their indices.
  template <class F>
  void for_rows(const F& f) const {
    constexpr int64_t STEP = 64;
    const int64_t k = atoms.k;
    parallel(atoms.rows, 1 + 32768 / std::max<int64_t>(1, atoms.features * k), [&](int64_t begin, int64_t end) {
      for (; begin < end; begin += STEP) {
        const int64_t last = std::min(begin + STEP, end);
        if (!is_packed_) indices_.check(begin * k, last * k, rows_.count);
        f(begin, last);
      }
    });
  }

 private:
  const Indices& indices_;
  Rows rows_;
  bool is_packed_;
  Array<int64_t> numbers_;
  Array<float> packed_;
  std::optional<Matrix> whole_;
};

}  // namespace

Tensor sparse_decode_fwd(const Tensor& values, const Tensor& indices, const Tensor& dictionary) {
  check_atoms(values, indices, dictionary);
  const Indices which("indices", indices);
  const Matrix coefficients("values", values);
  const Kept kept(dictionary, which, coefficients.features);
  const ScalarType type = values.scalar_type() == dictionary.scalar_type() ? values.scalar_type() : ScalarType::Float;
  const Tensor out = new_tensor(values, shape_with(values, {dictionary.size(1)}), type);
  const Rows out_rows = rows_of("out", out);
  const Kernels& k = kernels();
  kept.for_rows(
      [&](int64_t begin, int64_t end) { k.decode_rows(kept.atoms, coefficients.data, begin, end, out_rows); });
  return out;
}

std::tuple<Tensor, Tensor> sparse_decode_bwd(
    const Tensor& grad, const Tensor& values, const Tensor& indices, const Tensor& dictionary, bool need_values,
    bool need_dictionary) {
  check_atoms(values, indices, dictionary);
  const Rows rows = rows_of("grad", grad);
  const Indices which("indices", indices);
  const int64_t per_row = indices.size(indices.dim() - 1);
  STD_TORCH_CHECK(
      rows.features == dictionary.size(1) && rows.count * per_row == which.count,
      "expected grad of shape [..., D] for indices ", shape_text(indices), " and dictionary ", shape_text(dictionary),
      ", got ", shape_text(grad));
  const Tensor grad_values = new_tensor(grad, need_values ? shape_of(values) : std::vector<int64_t>{0});
  const Tensor grad_dictionary = new_tensor(grad, need_dictionary ? shape_of(dictionary) : std::vector<int64_t>{0});
  if (need_values) {
    const Kept kept(dictionary, which, per_row);
    const Kernels& k = kernels();
    float* to = data_of<float>(grad_values);
    kept.for_rows([&](int64_t begin, int64_t end) { k.atom_products(kept.atoms, rows, begin, end, to); });
  }
  if (need_dictionary) {
    const Matrix coefficients("values", values);
    const SortedPairs pairs(which, per_row, dictionary.size(0), 1, coefficients.data, nullptr);
    segment_sum(rows, pairs, per_row, 1, data_of<float>(grad_dictionary), rows.features);
  }
  return {grad_values, grad_dictionary};
}

}  // namespace dlvae
