#include "packed_codebook.h"

#include <cmath>

#include "code_sample.h"

namespace dlvae {
namespace {

// Each task measures or packs about this many features.
constexpr int64_t GRAIN = 32768;

// Codes with a largest feature in this range need no scaling, and neither do rows of similar length.
constexpr float LEAST = 0x1p-20f, MOST = 0x1p20f;

// If the longest code is this many times longer than the code at the lowest eighth of lengths, each code gets its own
// error bound.
constexpr double SPREAD = 16;

float scale_of(double peak) {
  if (peak == 0 || (peak >= LEAST && peak <= MOST)) return 1;
  return std::ldexp(1.0f, std::clamp(-std::ilogb(peak), -100, 100));
}

}  // namespace

Array<float> without_centre(const float* codes, int64_t count, int64_t features, const float* centre) {
  Array<float> centred = new_array<float>(count * features);
  parallel(count, 1 + GRAIN / features, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k)
      for (int64_t d = 0, i = k * features; d < features; ++d, ++i) centred[i] = codes[i] - centre[d];
  });
  return centred;
}

Heads::Heads(const Kernels& kernels, const Tensor& x, const Tensor& codebook) {
  const Rows all = rows_of("x", x);
  const int64_t dim = codebook.dim();
  STD_TORCH_CHECK(dim == 2 || dim == 3, "expected codebook of shape [K, D] or [H, K, D], got ", shape_text(codebook));
  exist_ = dim == 3;
  count_ = exist_ ? codebook.size(0) : 1;
  const int64_t num_codes = codebook.size(dim - 2), features = codebook.size(dim - 1);
  STD_TORCH_CHECK(
      all.features == features, "expected x of D = ", features, " features as in codebook, got ", all.features);
  STD_TORCH_CHECK(
      !exist_ || (count_ >= 1 && x.dim() >= 2 && x.size(x.dim() - 2) == count_),
      "expected x of shape [..., H, D] with H >= 1 for codebook ", shape_text(codebook), ", got ", shape_text(x));
  num_rows_ = all.count / count_;
  if (num_rows_ == 0) return;
  STD_TORCH_CHECK(
      num_codes >= 1 && features >= 1, "expected codebook of shape [K, D] or [H, K, D] with K >= 1 and D >= 1, got ",
      shape_text(codebook));
  codes_.emplace("codebook", codebook);
  books_.resize(count_);
  // Threads pack one head each or, if there are more threads than heads, one head after another together.
  const int64_t grain = count_ < torch::stable::get_num_threads() ? count_ : 1;
  parallel(count_, grain, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head)
      books_[head] = std::make_unique<PackedCodebook>(
          kernels, codes_->data + head * num_codes * features, num_codes, features, rows("x", x, head));
  });
}

Rows Heads::rows(const char* name, const Tensor& tensor, int64_t head) const {
  if (!exist_) return rows_of(name, tensor);
  const int64_t dim = tensor.dim();
  std::vector<int64_t> order(dim - 1);
  std::iota(order.begin(), order.end(), 0);
  order.back() = dim - 1;
  Rows rows = rows_of(name, tensor, order);
  rows.data = static_cast<char*>(rows.data) + head * tensor.stride(dim - 2) * (int64_t)tensor.element_size();
  return rows;
}

PackedCodebook::PackedCodebook(
    const Kernels& kernels, const float* codes, int64_t count, int64_t features, const Rows& x) {
  STD_TORCH_CHECK(
      count < INT32_MAX - kernels.panel, "expected codebook of at most ", INT32_MAX - kernels.panel - 1, " codes, got ",
      count);
  book_.codes = book_.centred = codes;
  book_.count = count;
  book_.features = features;
  if (x.count <= FEW_ROWS) {
    find(kernels, x);
    return;
  }
  measure(kernels);
  if (centre()) measure(kernels);
  leave_out_repeated();
  pack(kernels);
}

void PackedCodebook::find(const Kernels& kernels, const Rows& x) {
  const int64_t count = book_.count, features = book_.features, ld = (features + 15) / 16 * 16;
  found_ = new_array<Found>(x.count);
  std::fill(found_.get(), found_.get() + x.count, Found{0, -1});
  book_.found = found_.get();
  const int64_t padded = FEW_ROWS * ld;
  const Array<float> rows = new_array<float>(padded);
  std::fill(rows.get(), rows.get() + padded, 0.0f);
  kernels.load_rows(x, 0, x.count, rows.get(), ld);
  std::mutex mutex;
  parallel(count, 1 + GRAIN / features, [&](int64_t begin, int64_t end) {
    Found found[FEW_ROWS];
    kernels.search_few(book_, rows.get(), ld, x.count, begin, end, found);
    const std::lock_guard<std::mutex> lock(mutex);
    for (int64_t r = 0; r < x.count; ++r)
      if (found[r].index >= 0 && found_[r].loses_to(found[r].distance, found[r].index)) found_[r] = found[r];
  });
  const auto has_nan = [&](const float* v) {
    return std::any_of(v, v + features, [](float value) { return std::isnan(value); });
  };
  for (int64_t r = 0; r < x.count; ++r) {
    int64_t& index = found_[r].index;
    // A row that holds an infinity is assigned to the first code without NaN.
    const int64_t end = has_nan(&rows[r * ld]) ? 0 : count;
    for (int64_t k = 0; k < end && index < 0; ++k)
      if (!has_nan(book_.codes + k * features)) index = k;
    index = std::max<int64_t>(0, index);
  }
}

// Subtracts the centre if the codes lie around one. Returns whether they do.
bool PackedCodebook::centre() {
  const int64_t count = book_.count, features = book_.features;
  centre_ =
      centre_of(book_.codes, count, features, [&](int64_t k) { return std::isfinite(peaks_[k]) ? norms_[k] : NAN; });
  if (!centre_) return false;
  centred_ = without_centre(book_.codes, count, features, centre_.get());
  book_.centre = centre_.get();
  book_.centred = centred_.get();
  return true;
}

// Marks the codes that equal an earlier one: they are never the nearest.
void PackedCodebook::leave_out_repeated() {
  const int64_t features = book_.features;
  const auto are_equal = [&](int64_t k, int64_t other) {
    const float* code = book_.codes + k * features;
    return std::equal(code, code + features, book_.codes + other * features);
  };
  const auto counts = [&](int64_t k) { return std::isfinite(peaks_[k]); };
  for_repeated(book_.count, hashes_.get(), counts, are_equal, [&](int64_t k, int64_t) { peaks_[k] = INFINITY; });
}

void PackedCodebook::measure(const Kernels& kernels) {
  const int64_t count = book_.count;
  peaks_ = new_array<float>(count);
  norms_ = new_array<double>(count);
  hashes_ = new_array<uint32_t>(count);
  book_.peaks = peaks_.get();
  book_.norms = norms_.get();
  book_.hashes = hashes_.get();
  parallel(
      count, 1 + GRAIN / book_.features, [&](int64_t begin, int64_t end) { kernels.measure_codes(book_, begin, end); });
}

void PackedCodebook::pack(const Kernels& kernels) {
  const int64_t count = book_.count, features = book_.features, panels = (count + kernels.panel - 1) / kernels.panel;
  float peak = 0;
  double norm = 0;
  for (int64_t k = 0; k < count; ++k) {
    if (!std::isfinite(peaks_[k])) continue;
    book_.any_finite = true;
    peak = std::max(peak, peaks_[k]);
    norm = std::max(norm, norms_[k]);
  }
  std::vector<double> sample;
  for_sample(count, [&](int64_t k) {
    if (std::isfinite(peaks_[k])) sample.push_back(norms_[k]);
  });
  std::sort(sample.begin(), sample.end());
  book_.is_spread = !sample.empty() && norm > SPREAD * sample[sample.size() / 8];
  book_.scale = scale_of(book_.is_spread ? sample[sample.size() * 3 / 4] : (double)peak);
  book_.peak = peak * book_.scale;
  book_.norm = static_cast<float>(norm * book_.scale * (1 + 0x1p-22));
  book_.steps = kernels.packed_steps(book_);
  losses_ = new_array<float>(count);
  book_.losses = losses_.get();
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
