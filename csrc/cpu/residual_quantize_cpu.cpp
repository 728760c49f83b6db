// Residual quantization: all levels in one pass over x; its gradients, and the statistics of all levels.
#include <atomic>
#include <cmath>

#include "operations_cpu.h"
#include "packed_codebook.h"
#include "flags.h"
#include "residual.h"
#include "segment_sum_cpu.h"

namespace dlvae {
namespace {

// The most memory for residuals whose sums by code are computed together.
constexpr int64_t RESIDUAL_BYTES = 4 << 20;

void check_codebooks(const Tensor& codebooks, const Rows& x) {
  check_device("codebooks", codebooks);
  STD_TORCH_CHECK(
      codebooks.dim() == 3 && codebooks.numel() > 0, "expected codebooks of shape [L, K, D] with L, K and D >= 1, got ",
      shape_text(codebooks));
  STD_TORCH_CHECK(
      x.features == codebooks.size(2), "expected x of D = ", codebooks.size(2), " features as in codebooks, got ",
      x.features);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> residual_quantize_fwd(
    const Tensor& x, const Tensor& codebooks, OptionalTensor levels, OptionalTensor mask, std::string precision,
    std::string gradient) {
  const Rows rows = rows_of("x", x);
  check_codebooks(codebooks, rows);
  const int64_t num_levels = codebooks.size(0), num_codes = codebooks.size(1), features = rows.features;
  const Flags runs("levels", levels, {num_levels}), is_valid("mask", mask, shape_with(x, {}));
  const Tensor quantized = new_like(x);
  const Tensor indices = new_tensor(x, shape_with(x, {num_levels}), ScalarType::Long);
  const Tensor codebook_loss = new_tensor(x, {num_levels}), commitment_loss = new_tensor(x, {num_levels});
  const Tensor counts = new_tensor(x, {num_levels, num_codes}, ScalarType::Long);
  const Rows quantized_rows = rows_of("quantized", quantized);
  int64_t* index = data_of<int64_t>(indices);

  const Kernels& k = kernels();
  // A few rows are searched in the codebook of each level as it is; for more, all codebooks are packed once.
  const bool are_few = rows.count <= FEW_ROWS;
  const Matrix books("codebooks", codebooks);
  const auto packed_for = [&](int64_t level, const Rows& searched) {
    const float* const book = books.data + level * num_codes * features;
    return std::make_unique<PackedCodebook>(k, book, num_codes, features, searched);
  };
  std::vector<std::unique_ptr<PackedCodebook>> packed(num_levels);
  for (int64_t level = 0; level < num_levels && !are_few; ++level)
    if (runs[level]) packed[level] = packed_for(level, rows);

  const int64_t blocks = (rows.count + BLOCK - 1) / BLOCK;
  const Array<double> losses = new_array<double>(blocks * num_levels);
  const auto quantize_blocks = [&](int64_t begin, int64_t end) {
    const Array<float> residuals = new_array<float>(BLOCK * features), sums = new_array<float>(BLOCK * features);
    int64_t found[BLOCK], places[BLOCK];
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * BLOCK, last = std::min(first + BLOCK, rows.count);
      k.load_rows(rows, first, last, residuals.get(), features);
      std::fill_n(sums.get(), (last - first) * features, 0.0f);
      std::fill(index + first * num_levels, index + last * num_levels, -1);
      // The valid rows move to the front.
      int64_t count = 0;
      for (int64_t r = 0; r < last - first; ++r) {
        if (!is_valid[first + r]) continue;
        if (r > count) std::copy_n(&residuals[r * features], features, &residuals[count * features]);
        places[count++] = r;
      }
      for (int64_t level = 0; level < num_levels; ++level) {
        double& loss = losses[b * num_levels + level];
        loss = 0;
        if (!runs[level] || count == 0) continue;
        if (are_few) packed[level] = packed_for(level, contiguous_rows(residuals.get(), count, features));
        loss = k.quantize_residuals(packed[level]->book(), residuals.get(), sums.get(), count, found);
        for (int64_t i = 0; i < count; ++i) index[(first + places[i]) * num_levels + level] = found[i];
      }
      for (int64_t i = count - 1; i >= 0 && places[i] > i; --i) {
        std::copy_n(&sums[i * features], features, &sums[places[i] * features]);
        std::fill_n(&sums[i * features], features, 0.0f);
      }
      k.store_rows(quantized_rows, first, last, sums.get(), features);
    }
  };
  // The search of a few rows runs on all threads itself.
  are_few ? quantize_blocks(0, blocks) : parallel(blocks, 1, quantize_blocks);

  int64_t* count = data_of<int64_t>(counts);
  std::fill_n(count, num_levels * num_codes, 0);
  int64_t num_valid = 0;
  for (int64_t r = 0; r < rows.count; ++r) {
    num_valid += is_valid[r];
    for (int64_t level = 0; level < num_levels; ++level) {
      const int64_t code = index[r * num_levels + level];
      if (code >= 0) ++count[level * num_codes + code];
    }
  }
  for (int64_t level = 0; level < num_levels; ++level) {
    // The order of the sum does not depend on the number of threads.
    double loss = 0;
    for (int64_t b = 0; b < blocks; ++b) loss += losses[b * num_levels + level];
    loss /= static_cast<double>(std::max<int64_t>(1, num_valid * features));
    for (const Tensor& each : {codebook_loss, commitment_loss}) data_of<float>(each)[level] = static_cast<float>(loss);
  }
  return {quantized, indices, codebook_loss, commitment_loss, counts};
}

namespace {

// x, and the codes that were subtracted from it at each level.
class Residuals {
 public:
  Residuals(const Tensor& x, const Tensor& indices, const Tensor& codebooks)
      : rows(rows_of("x", x)),
        indices_tensor_(indices),
        indices_("indices", indices, -1),
        books_("codebooks", codebooks) {
    check_codebooks(codebooks, rows);
    levels = codebooks.size(0);
    codes = codebooks.size(1);
    STD_TORCH_CHECK(
        indices.dim() >= 1 && indices.size(-1) == levels && indices_.count == rows.count * levels,
        "expected indices of shape [..., L] for x [..., D] and codebooks [L, K, D], got ", shape_text(indices));
    indices_.check(0, indices_.count, codes);
  }
  const Rows rows;
  int64_t levels, codes;

  const float* books() const { return books_.data; }
  const int64_t* indices() const { return indices_.data; }

  // Sums the residuals that each level found (or, if `left`, that it left) by code: out[l, k, 0:D] is `weights[l]` times
  // the sum over the rows of code k. left_out: a flag [L, N] for each residual that is skipped, or null. Returns the
  // sorted pairs of each level.
  std::vector<SortedPairs> sum(bool left, const float* weights, const bool* left_out, float* out, int64_t ld) const {
    const Kernels& k = kernels();
    const int64_t features = rows.features;
    std::vector<SortedPairs> pairs;
    std::vector<SegmentSum> sums;
    pairs.reserve(levels);
    for (int64_t level = 0; level < levels; ++level) {
      Tensor all = indices_tensor_;
      const Indices of_level("indices", torch::stable::narrow(all, -1, level, 1), -1);
      pairs.emplace_back(of_level, 1, codes, 1, nullptr, left_out == nullptr ? nullptr : left_out + level * rows.count);
      sums.emplace_back(pairs[level].segments(weights[level]), features, out + level * codes * ld, ld);
    }
    const int64_t block = std::clamp<int64_t>(RESIDUAL_BYTES / (features * 4), 1, std::max<int64_t>(1, rows.count));
    const Array<float> residuals = new_array<float>(block * features);
    for (int64_t begin = 0; begin == 0 || begin < rows.count; begin += block) {
      const int64_t end = std::min(begin + block, rows.count);
      const auto for_rows = [&](const auto& f) {
        parallel(end - begin, 1 + 16384 / features, [&](int64_t first, int64_t last) {
          f(first, last, residuals.get() + first * features);
        });
      };
      for_rows([&](int64_t first, int64_t last, float* to) {
        k.load_rows(rows, begin + first, begin + last, to, features);
      });
      for (int64_t level = 0; level < levels; ++level) {
        if (!left) sums[level].add(begin, end, residuals.get(), features);
        for_rows([&](int64_t first, int64_t last, float* to) { subtract(level, begin + first, begin + last, to); });
        if (left) sums[level].add(begin, end, residuals.get(), features);
      }
    }
    return pairs;
  }

  // Sets a flag [L, N] for each residual that holds NaN or infinity.
  void find_not_finite(bool* is_not_finite) const {
    const Kernels& k = kernels();
    parallel(rows.count, 1 + 16384 / rows.features, [&](int64_t begin, int64_t end) {
      const Array<float> residual = new_array<float>(rows.features);
      for (int64_t row = begin; row < end; ++row) {
        k.load_rows(rows, row, row + 1, residual.get(), rows.features);
        for (int64_t level = 0; level < levels; ++level) {
          is_not_finite[level * rows.count + row] = !all_finite(residual.get(), rows.features);
          subtract(level, row, row + 1, residual.get());
        }
      }
    });
  }

 private:
  // Subtracts the codes of a level from the residuals of rows [begin, end).
  void subtract(int64_t level, int64_t begin, int64_t end, float* residuals) const {
    kernels().subtract_codes(
        books_.data + level * codes * rows.features, indices_.data + begin * levels + level, levels, end - begin,
        rows.features, residuals);
  }

  const Tensor indices_tensor_;
  const Indices indices_;
  const Matrix books_;
};

// Returns `scale` times each number of a tensor [L].
std::vector<float> scaled(const char* name, const Tensor& tensor, int64_t count, double scale) {
  STD_TORCH_CHECK(
      tensor.dim() == 1 && tensor.size(0) == count, "expected ", name, " of shape [L], got ", shape_text(tensor));
  std::vector<float> numbers(count);
  kernels().load_rows(rows_of(name, torch::stable::unsqueeze(tensor, -1)), 0, count, numbers.data(), 1);
  for (float& number : numbers) number = static_cast<float>(scale * number);
  return numbers;
}

ResidualGradient gradient_of(const std::string& name) {
  if (name == "once") return ResidualGradient::once;
  if (name == "each") return ResidualGradient::each;
  if (name == "rotation") return ResidualGradient::rotation;
  if (name == "rotation_each") return ResidualGradient::rotation_each;
  STD_TORCH_CHECK(false, "expected gradient to be 'once', 'each', 'rotation' or 'rotation_each', got '", name, "'");
}

}  // namespace

std::tuple<Tensor, Tensor> residual_quantize_bwd(
    const Tensor& grad_quantized, const Tensor& grad_codebook_loss, const Tensor& grad_commitment_loss, const Tensor& x,
    const Tensor& indices, const Tensor& codebooks, std::string gradient, bool need_x, bool need_codebooks) {
  const Residuals residuals(x, indices, codebooks);
  const int64_t levels = residuals.levels, features = residuals.rows.features;
  // The square of the residual that a level leaves has the gradient `slope` times that residual by x, and minus this by
  // the code.
  const double slope = 2.0 / static_cast<double>(std::max<int64_t>(1, x.numel()));
  Tensor grad_x = new_tensor(x, {0}), grad_codebooks = new_tensor(x, {0});
  if (need_codebooks) {
    grad_codebooks = new_tensor(x, {levels, residuals.codes, features});
    const std::vector<float> weights = scaled("grad_codebook_loss", grad_codebook_loss, levels, -slope);
    residuals.sum(true, weights.data(), nullptr, data_of<float>(grad_codebooks), features);
  }
  if (need_x) {
    STD_TORCH_CHECK(
        shape_of(grad_quantized) == shape_of(x), "expected grad_quantized of the shape of x, ", shape_text(x), ", got ",
        shape_text(grad_quantized));
    grad_x = new_like(x);
    const std::vector<float> weights = scaled("grad_commitment_loss", grad_commitment_loss, levels, slope);
    const ResidualBackward task{residuals.books(),        levels,
                                residuals.codes,          residuals.indices(),
                                weights.data(),           gradient_of(gradient),
                                residuals.rows,           rows_of("grad_quantized", grad_quantized),
                                rows_of("grad_x", grad_x)};
    const Kernels& k = kernels();
    parallel(task.x.count, 1 + 16384 / (features * levels), [&](int64_t begin, int64_t end) {
      k.residual_grad_rows(task, begin, end);
    });
  }
  return {grad_x, grad_codebooks};
}

Tensor residual_statistics(const Tensor& x, const Tensor& indices, const Tensor& codebooks) {
  const Residuals residuals(x, indices, codebooks);
  const int64_t levels = residuals.levels, codes = residuals.codes, features = residuals.rows.features;
  const int64_t ld = features + 1;
  const Tensor statistics = new_tensor(x, {levels, codes, ld});
  float* out = data_of<float>(statistics);
  const std::vector<float> ones(levels, 1.0f);
  // Returns whether all sums are finite.
  const auto sum = [&](const bool* left_out) {
    const std::vector<SortedPairs> pairs = residuals.sum(false, ones.data(), left_out, out, ld);
    std::atomic<bool> is_finite{true};
    parallel(levels * codes, 1 + 32768 / ld, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t count = pairs[i / codes].count_of(i % codes);
        out[i * ld + features] = static_cast<float>(count);
        if (count > 0 && !all_finite(out + i * ld, features)) is_finite = false;
      }
    });
    return is_finite.load();
  };
  // Sums of finite residuals are almost always finite, so the residuals are examined only if a sum is not.
  if (!sum(nullptr)) {
    const Array<bool> is_not_finite = new_array<bool>(levels * residuals.rows.count);
    residuals.find_not_finite(is_not_finite.get());
    sum(is_not_finite.get());
  }
  return statistics;
}

}  // namespace dlvae
