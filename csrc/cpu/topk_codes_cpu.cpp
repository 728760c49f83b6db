#include <cmath>
#include <numeric>
#include <string>
#include <tuple>

#include "code_sample.h"
#include "operations_cpu.h"

namespace dlvae {
namespace {

// The order in which codes are packed, and the codes that follow them.
struct Codes {
  std::vector<int32_t> ids, others, next;
  int64_t packed = 0, infinite = 0;
  double longest = 0;  // length of the longest packed code
  double peak = 0;

  Codes(const Topk& t, const Codebook& book) {
    const auto bias_of = [&](int64_t c) { return t.bias == nullptr ? 0.0f : t.bias[c]; };
    const auto is_finite = [&](int64_t c) { return std::isfinite(book.peaks[c]) && std::isfinite(bias_of(c)); };
    const auto are_equal = [&](int64_t c, int64_t other) {
      const float* code = t.codes + c * t.features;
      return bias_of(c) == bias_of(other) && std::equal(code, code + t.features, t.codes + other * t.features);
    };
    std::vector<int32_t> last;
    for_repeated(t.count, book.hashes, is_finite, are_equal, [&](int64_t c, int64_t first) {
      if (last.empty()) {
        next.assign(t.count, -1);
        last.resize(t.count);
        std::iota(last.begin(), last.end(), 0);
      }
      next[last[first]] = (int32_t)c;
      last[first] = (int32_t)c;
      last[c] = -1;
    });
    std::vector<int32_t> nans;
    for (int64_t c = 0; c < t.count; ++c) {
      if (is_finite(c)) {
        if (last.empty() || last[c] >= 0) ids.push_back((int32_t)c);
      } else if (std::isnan(book.peaks[c]) || std::isnan(bias_of(c))) {
        nans.push_back((int32_t)c);
      } else {
        others.push_back((int32_t)c);
      }
    }
    infinite = (int64_t)others.size();
    others.insert(others.end(), nans.begin(), nans.end());
    packed = (int64_t)ids.size();
    set_long_apart(book);
    for (int64_t i = 0; i < packed; ++i) longest = std::max(longest, book.norms[ids[i]]);
    for (int32_t c : ids) peak = std::max<double>(peak, book.peaks[c]);
  }

  // The error bound of scores grows with the longest packed code. A few codes far longer than the others are moved to
  // the end and are not packed.
  void set_long_apart(const Codebook& book) {
    constexpr double FAR = 16;
    const int64_t most = 1 + packed / 64;
    if (packed <= most) return;
    std::vector<double> norms;
    for (int32_t c : ids) norms.push_back(book.norms[c]);
    std::nth_element(norms.begin(), norms.end() - 1 - most, norms.end());
    const double limit = FAR * norms[packed - 1 - most];
    const auto is_near = [&](int32_t c) { return book.norms[c] <= limit; };
    packed = std::stable_partition(ids.begin(), ids.end(), is_near) - ids.begin();
  }
};

// A few rows are searched in the unpacked dictionary if k is at most 1 / FEW_SHARE of the number of codes.
constexpr int64_t FEW_SHARE = 8;

float start_of(const Topk& t, double square, int64_t code) {
  const double start = t.is_product ? (t.bias == nullptr ? 0 : -(double)t.bias[code]) : square / 2;
  return (float)std::min<double>(std::max<double>(start * t.scale, -LARGEST_START), LARGEST_START);
}

// Finds the best codes of a few rows in one pass over the unpacked dictionary, which all threads share.
void topk_of_few(const Kernels& kernels, const Topk& t) {
  const int64_t n = t.x.count, features = t.features, ld = (features + 15) / 16 * 16, padded = FEW_ROWS * ld;
  const Array<float> rows = new_array<float>(padded);
  std::fill(rows.get(), rows.get() + padded, 0.0f);
  kernels.load_rows(t.x, 0, n, rows.get(), ld);
  std::vector<std::vector<Exact>> all(n);
  std::mutex mutex;
  parallel(t.count, 1 + 32768 / features, [&](int64_t begin, int64_t end) {
    std::vector<Exact> found(n * t.k);
    kernels.topk_few(t, rows.get(), ld, n, begin, end, found.data());
    const std::lock_guard<std::mutex> lock(mutex);
    for (int64_t i = 0; i < n * t.k; ++i)
      if (found[i].place >= 0) all[i / t.k].push_back(found[i]);
  });
  for (int64_t r = 0; r < n; ++r) {
    const float* row = &rows[r * ld];
    int64_t* indices = t.indices + r * t.k;
    float* values = t.values + r * t.k;
    if (std::any_of(row, row + features, [](float value) { return std::isnan(value); })) {
      std::iota(indices, indices + t.k, 0);
      std::fill(values, values + t.k, NAN);
      continue;
    }
    std::partial_sort(all[r].begin(), all[r].begin() + t.k, all[r].end(), [](const Exact& a, const Exact& b) {
      return std::tie(a.score, a.place) < std::tie(b.score, b.place);
    });
    for (int64_t i = 0; i < t.k; ++i) {
      const auto [score, code] = all[r][i];
      indices[i] = code;
      values[i] = (float)(t.is_product ? -score : score);
      if (score < std::numeric_limits<double>::max()) continue;
      // The score is not finite. A float32 sum in any order gives the same infinity or NaN.
      float sum = t.is_product && t.bias != nullptr ? t.bias[code] : 0;
      for (int64_t d = 0; d < features; ++d) {
        const float c = t.codes[code * features + d], difference = row[d] - c;
        sum += t.is_product ? row[d] * c : difference * difference;
      }
      values[i] = sum;
    }
  }
}

}  // namespace

std::tuple<Tensor, Tensor> topk_codes(
    const Tensor& x, const Tensor& dictionary, int64_t k, std::string metric, std::optional<Tensor> bias) {
  check_device("dictionary", dictionary);
  STD_TORCH_CHECK(metric == "l2" || metric == "dot", "expected metric to be 'l2' or 'dot', got '", metric, "'");
  STD_TORCH_CHECK(dictionary.dim() == 2, "expected dictionary of shape [K, D], got ", shape_text(dictionary));
  const Matrix codes("dictionary", dictionary);
  Topk t{};
  t.x = rows_of("x", x);
  STD_TORCH_CHECK(
      t.x.features == codes.features, "expected x of D = ", codes.features, " features as in dictionary, got ",
      t.x.features);
  STD_TORCH_CHECK(k >= 1 && k <= codes.rows, "expected k in [1, K] = [1, ", codes.rows, "], got ", k);
  STD_TORCH_CHECK(codes.rows < 1 << 30, "expected dictionary of fewer than 2^30 codes, got ", codes.rows);
  t.codes = codes.data;
  t.count = codes.rows;
  t.features = codes.features;
  t.k = k;
  t.is_product = metric == "dot";
  std::optional<Matrix> biases;
  if (bias.has_value()) {
    STD_TORCH_CHECK(t.is_product, "expected bias to be None with metric 'l2', got a tensor");
    STD_TORCH_CHECK(
        bias->dim() == 1 && bias->size(0) == t.count, "expected bias of shape [K] = [", t.count, "], got ",
        shape_text(*bias));
    biases.emplace("bias", torch::stable::unsqueeze(*bias, 1));
    t.bias = biases->data;
  }
  const Tensor indices = new_tensor(x, shape_with(x, {k}), ScalarType::Long);
  const Tensor values = new_tensor(x, shape_with(x, {k}));
  t.indices = data_of<int64_t>(indices);
  t.values = data_of<float>(values);
  if (t.x.count == 0) return {indices, values};

  const Kernels& all = kernels();
  if (t.x.count <= FEW_ROWS && t.k * FEW_SHARE <= t.count) {
    topk_of_few(all, t);
    return {indices, values};
  }
  const int64_t grain = 1 + 16384 / t.features;
  const Array<float> peaks = new_array<float>(t.count);
  const Array<double> norms = new_array<double>(t.count);
  const Array<uint32_t> hashes = new_array<uint32_t>(t.count);
  Codebook book{};
  book.codes = book.centred = t.centred = t.codes;
  book.count = t.count;
  book.features = t.features;
  book.peaks = peaks.get();
  book.norms = norms.get();
  book.hashes = hashes.get();
  const auto measure = [&] {
    parallel(t.count, grain, [&](int64_t begin, int64_t end) { all.measure_codes(book, begin, end); });
  };
  measure();
  const Array<float> centre =
      centre_of(t.codes, t.count, t.features, [&](int64_t c) { return std::isfinite(peaks[c]) ? norms[c] : NAN; });
  Array<float> centred;
  if (centre) {
    centred = without_centre(t.codes, t.count, t.features, centre.get());
    t.centre = centre.get();
    t.centred = book.centred = centred.get();
    measure();
  }
  const Codes split(t, book);
  t.packed = split.packed;
  t.apart = (int64_t)split.ids.size() - split.packed;
  t.ids = t.packed == t.count ? nullptr : split.ids.data();
  t.next = split.next.empty() ? nullptr : split.next.data();
  t.others = split.others.data();
  t.infinite = split.infinite;
  t.nans = (int64_t)split.others.size() - split.infinite;
  t.peak = split.peak;
  // Keeps the scale within the exponents of float32. The longest code may have length 0.
  const int exponent = split.longest == 0 ? 0 : std::max(-120, std::min(120, std::ilogb(split.longest)));
  t.scale = std::ldexp(1.0f, -exponent);
  t.norm = split.longest * t.scale;

  const int64_t panels = (t.packed + all.panel - 1) / all.panel;
  std::vector<float> start(panels * all.panel, NO_CODE);
  for (int64_t i = 0; i < t.packed; ++i) {
    const int64_t code = t.ids == nullptr ? i : t.ids[i];
    start[i] = start_of(t, norms[code] * norms[code], code);
  }
  const Tensor packed = new_tensor(x, {panels, t.features, all.panel});
  float* const to = data_of<float>(packed);
  t.panels = to;
  t.start = start.data();
  parallel(panels, 1 + grain / all.panel, [&](int64_t begin, int64_t end) { all.pack_topk(t, begin, end, to); });
  parallel(t.x.count, all.panel, [&](int64_t begin, int64_t end) { all.topk_rows(t, begin, end); });
  return {indices, values};
}

}  // namespace dlvae
