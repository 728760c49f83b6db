#include "packed_codebook.h"

#include <cmath>

namespace dlvae {
namespace {

// About so many features are measured or packed at a time.
constexpr int64_t GRAIN = 32768;

constexpr int64_t FEW_ROWS = 2;

// Codes within these need no scaling: nor do rows about as long.
constexpr float LEAST = 0x1p-20f, MOST = 0x1p20f;

float scale_of(float peak) {
  if (peak == 0 || (peak >= LEAST && peak <= MOST)) return 1;
  return std::ldexp(1.0f, std::clamp(-std::ilogb(peak), -100, 100));
}

}  // namespace

void check_codebook(const Tensor& codebook, const Rows& x) {
  STD_TORCH_CHECK(codebook.dim() == 2, "codebook has ", codebook.dim(), " dimensions; it needs [K, D]");
  const int64_t features = codebook.size(1);
  STD_TORCH_CHECK(x.features == features, "x has D = ", x.features, "; it needs that of codebook, ", features);
}

PackedCodebook::PackedCodebook(const Kernels& kernels, const Tensor& codebook, int64_t rows)
    : codes_("codebook", codebook) {
  const int64_t count = codes_.rows, features = codes_.features, panels = (count + kernels.panel - 1) / kernels.panel;
  STD_TORCH_CHECK(
      count >= 1 && features >= 1,
      "codebook has shape [", count, ", ", features, "]; it needs [K, D] with K >= 1 and D >= 1");
  STD_TORCH_CHECK(
      count < INT32_MAX - kernels.panel, "codebook has ", count, " codes; the compiled search takes fewer than 2^31");
  book_.codes = codes_.data;
  book_.count = count;
  book_.features = features;
  peaks_ = new_array<float>(count);
  norms_ = new_array<double>(count);
  losses_ = new_array<float>(count);
  book_.peaks = peaks_.get();
  book_.norms = norms_.get();
  book_.losses = losses_.get();
  parallel(count, 1 + GRAIN / features, [&](int64_t begin, int64_t end) { kernels.measure_codes(book_, begin, end); });
  float peak = 0;
  double norm = 0;
  for (int64_t k = 0; k < count; ++k) {
    if (!std::isfinite(peaks_[k])) continue;
    book_.any_finite = true;
    peak = std::max(peak, peaks_[k]);
    norm = std::max(norm, norms_[k]);
  }
  if (rows <= FEW_ROWS) return;
  book_.scale = scale_of(peak);
  book_.peak = peak * book_.scale;
  book_.norm = static_cast<float>(norm * book_.scale * (1 + 0x1p-22));
  book_.steps = kernels.packed_steps(book_);
  words_ = new_array<uint32_t>(panels * kernels.panel * book_.steps);
  start_ = new_array<float>(panels * kernels.panel);
  book_.words = words_.get();
  book_.start = start_.get();
  parallel(panels, 1 + GRAIN / (features * kernels.panel), [&](int64_t begin, int64_t end) {
    kernels.pack_panels(book_, begin, end);
  });
  book_.loss = *std::max_element(losses_.get(), losses_.get() + count);
}

}  // namespace dlvae
