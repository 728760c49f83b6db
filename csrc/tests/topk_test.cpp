// topk_rows against all scores in float64.
#include <algorithm>
#include <cmath>
#include <tuple>

#include "check.h"

namespace dlvae {
namespace {

struct Case {
  int64_t n, count, features, k;
  bool is_product, has_bias;
  Form form;
  bool links_equal;  // equal codes are searched only once
  bool is_centred;
};

// Codes without those that are not finite, measured and packed in the same way as in the library.
struct Packed {
  Packed(const Kernels& kernels, const Case& c, const Numbers& codes, const Numbers& bias) {
    t.codes = codes.data();
    t.bias = c.has_bias ? bias.data() : nullptr;
    t.count = c.count;
    t.features = c.features;
    t.k = c.k;
    t.is_product = c.is_product;
    Numbers peaks(c.count);
    std::vector<double> norms(c.count);
    std::vector<uint32_t> hashes(c.count);
    Codebook book{};
    book.codes = book.centred = t.centred = codes.data();
    book.count = c.count;
    book.features = c.features;
    book.peaks = peaks.data();
    book.norms = norms.data();
    book.hashes = hashes.data();
    centred = codes;
    centre.assign(codes.begin(), codes.begin() + c.features);
    for (int64_t i = 0; i < c.count * c.features; ++i) centred[i] -= centre[i % c.features];
    const bool has_centre =
        c.is_centred && std::all_of(centre.begin(), centre.end(), [](float value) { return std::abs(value) < 1e30f; });
    if (has_centre) {
      t.centre = centre.data();
      t.centred = book.centred = centred.data();
    }
    kernels.measure_codes(book, 0, c.count / 2);
    kernels.measure_codes(book, c.count / 2, c.count);
    std::vector<int32_t> nans;
    double longest = 0;
    next.assign(c.count, -1);
    for (int64_t i = 0; i < c.count; ++i) {
      const float *code = &codes[i * c.features], *measured = &t.centred[i * c.features];
      double square = 0;
      for (int64_t d = 0; d < c.features; ++d) square += (double)measured[d] * measured[d];
      const double norm = std::isfinite(square) ? std::sqrt(square) : 0;
      const bool is_same = std::abs(norms[i] - norm) <= 1e-13 * norm;
      CHECK(
          is_same && std::isnan(peaks[i]) == std::isnan(square) && std::isfinite(peaks[i]) == std::isfinite(square),
          "code %ld has length %g and peak %g, its square is %g", (long)i, norms[i], peaks[i], square);
      const double both = square + (c.has_bias ? std::abs(bias[i]) : 0);
      if (!std::isfinite(both)) {
        (std::isnan(both) ? nans : others).push_back((int32_t)i);
        continue;
      }
      t.peak = std::max<double>(t.peak, peaks[i]);
      int64_t last = i - 1;
      const auto equals = [&](int64_t other) {
        return hashes[i] == hashes[other] && std::equal(code, code + c.features, &codes[other * c.features]) &&
               (!c.has_bias || bias[i] == bias[other]);
      };
      while (c.links_equal && last >= 0 && !equals(last)) --last;
      if (c.links_equal && last >= 0) {
        next[last] = (int32_t)i;
      } else {
        ids.push_back((int32_t)i);
      }
    }
    t.infinite = (int64_t)others.size();
    t.nans = (int64_t)nans.size();
    others.insert(others.end(), nans.begin(), nans.end());
    ids.shrink_to_fit();
    others.shrink_to_fit();
    // The first codes are treated as far longer than the others, whether they are or not.
    t.apart = ids.size() > 9 ? 3 : 0;
    std::rotate(ids.begin(), ids.begin() + t.apart, ids.end());
    t.packed = (int64_t)ids.size() - t.apart;
    for (int64_t i = 0; i < t.packed; ++i) longest = std::max(longest, norms[ids[i]]);
    t.ids = t.packed == c.count ? nullptr : ids.data();
    t.next = c.links_equal ? next.data() : nullptr;
    t.others = others.data();
    t.scale = std::ldexp(1.0f, longest == 0 ? 0 : -std::clamp(std::ilogb(longest), -120, 120));
    t.norm = longest * t.scale;
    const int64_t panels = (t.packed + kernels.panel - 1) / kernels.panel;
    start = Numbers(panels * kernels.panel, NO_CODE);
    for (int64_t i = 0; i < t.packed; ++i) {
      const double first = t.is_product ? (c.has_bias ? -(double)bias[ids[i]] : 0) : norms[ids[i]] * norms[ids[i]] / 2;
      start[i] = (float)std::clamp<double>(first * t.scale, -LARGEST_START, LARGEST_START);
    }
    panels_ = Numbers(panels * kernels.panel * c.features);
    t.panels = panels_.data();
    t.start = start.data();
    kernels.pack_topk(t, panels / 2, panels, panels_.data());
    kernels.pack_topk(t, 0, panels / 2, panels_.data());
  }
  Packed(const Packed&) = delete;

  Topk t{};
  std::vector<int32_t> ids, others, next;
  Numbers start, panels_, centre, centred;
};

// The order of codes: finite scores, then scores that are not finite by index, then codes that hold NaN.
struct Score {
  int kind;
  double score;
  int64_t index;
  double size;  // size of the terms of the sum

  bool operator<(const Score& other) const {
    return std::tie(kind, score, index) < std::tie(other.kind, other.score, other.index);
  }
};

Score score_of(const Topk& t, const float* x, int64_t code) {
  const double bias = t.bias == nullptr ? 0 : t.bias[code];
  double sum = bias, size = std::abs(bias);
  bool is_nan = std::isnan(bias);
  for (int64_t d = 0; d < t.features; ++d) {
    const double a = x[d], b = t.codes[code * t.features + d], term = t.is_product ? a * b : (a - b) * (a - b);
    sum += term;
    size += std::abs(term);
    is_nan |= std::isnan(b);
  }
  if (is_nan) return {2, 0, code, 0};
  if (!std::isfinite(sum)) return {1, 0, code, 0};
  return {0, t.is_product ? -sum : sum, code, size};
}

double length_of(const float* v, int64_t features) {
  double square = 0;
  for (int64_t d = 0; d < features; ++d) square += (double)v[d] * v[d];
  return std::sqrt(square);
}

// A few rows without a packed dictionary, with the codes in two partitions: the same codes as topk_rows finds.
void test_few(const Kernels& kernels, const Topk& t, const Numbers& x, const std::vector<int64_t>& indices) {
  const int64_t n = std::min(t.x.count, FEW_ROWS), ld = (t.features + 15) / 16 * 16;
  Numbers rows((n + 3) / 4 * 4 * ld);
  rows.shrink_to_fit();
  for (int64_t r = 0; r < n; ++r) std::copy_n(&x[r * t.features], t.features, &rows[r * ld]);
  std::vector<Exact> parts[2] = {std::vector<Exact>(n * t.k), std::vector<Exact>(n * t.k)};
  kernels.topk_few(t, rows.data(), ld, n, 0, t.count / 3, parts[0].data());
  kernels.topk_few(t, rows.data(), ld, n, t.count / 3, t.count, parts[1].data());
  for (int64_t r = 0; r < n; ++r) {
    const float* row = &x[r * t.features];
    if (std::any_of(row, row + t.features, [](float value) { return std::isnan(value); })) continue;
    std::vector<std::pair<double, int32_t>> found;
    for (const auto& part : parts)
      for (int64_t i = r * t.k; i < (r + 1) * t.k; ++i)
        if (part[i].place >= 0) found.emplace_back(part[i].score, part[i].place);
    std::sort(found.begin(), found.end());
    CHECK((int64_t)found.size() >= t.k, "row %ld has %ld codes", (long)r, (long)found.size());
    for (int64_t i = 0; i < t.k; ++i)
      CHECK(
          found[i].second == indices[r * t.k + i], "code %ld of row %ld is %ld, not %ld", (long)i, (long)r,
          (long)found[i].second, (long)indices[r * t.k + i]);
  }
}

void test_case(const Kernels& kernels, const Case& c, const Numbers& rows, const Numbers& codes, const Numbers& bias) {
  Packed packed(kernels, c, codes, bias);
  Topk& t = packed.t;
  const Tensor tensor(kernels, c.form, rows, c.n, c.features);
  const Numbers x = tensor.values();
  t.x = tensor.rows;
  std::vector<int64_t> indices(c.n * c.k, -1);
  Numbers values(c.n * c.k);
  t.indices = indices.data();
  t.values = values.data();
  kernels.topk_rows(t, c.n / 3, c.n);
  kernels.topk_rows(t, 0, c.n / 3);
  if (c.n > 0) test_few(kernels, t, x, indices);
  std::vector<Score> all(c.count);
  for (int64_t r = 0; r < c.n; ++r) {
    const float* row = &x[r * c.features];
    for (int64_t i = 0; i < c.count; ++i) all[i] = score_of(t, row, i);
    const double length = length_of(row, c.features);
    if (!std::isnan(length)) std::sort(all.begin(), all.end());
    for (int64_t j = 0; j < c.k; ++j) {
      const int64_t index = indices[r * c.k + j];
      CHECK(index >= 0 && index < c.count, "row %ld has code %ld", (long)r, (long)index);
      const float value = c.is_product ? -values[r * c.k + j] : values[r * c.k + j];
      if (std::isnan(length)) {
        CHECK(index == j && std::isnan(value), "row %ld holds NaN and has code %ld at %g", (long)r, (long)index, value);
        continue;
      }
      const Score found = score_of(t, row, index), best = all[j];
      // Both sums are in float64, but in a different order.
      const double difference = std::abs(found.score - best.score), size = found.size + best.size;
      const bool are_numbers = found.kind == 0 && best.kind == 0;
      const bool is_near = are_numbers && difference > 0 && difference <= 1e-15 * (double)c.features * size;
      CHECK(
          index == best.index || is_near, "row %ld has code %ld at %g, and not %ld at %g", (long)r, (long)index,
          found.score, (long)best.index, best.score);
      if (found.kind != 0) {
        CHECK(!std::isfinite(value), "the value of what is not finite is %g", value);
        continue;
      }
      // Values are in float32: products are exact to the rounding of all terms; distances, which are computed by
      // differences if they are small, are exact to several digits.
      const double error = 1e-6 * (c.is_product ? length * t.norm / t.scale + 2 * found.size : 40 * found.score);
      const bool is_close = std::abs(value - found.score) <= error + 1e-37 || value == (float)found.score;
      CHECK(is_close, "row %ld: a value of %g, not %g", (long)r, value, found.score);
    }
    std::vector<int64_t> distinct(indices.begin() + r * c.k, indices.begin() + (r + 1) * c.k);
    std::sort(distinct.begin(), distinct.end());
    CHECK(std::adjacent_find(distinct.begin(), distinct.end()) == distinct.end(), "row %ld has a code twice", (long)r);
  }
}

}  // namespace

void test_topk(const Kernels& kernels) {
  Random random;
  const int64_t p = kernels.panel, r = kernels.rows;
  const auto test = [&](int64_t n, int64_t count, int64_t d, int64_t k, const auto& change, Form form = PLAIN) {
    for (int metric = 0; metric < 3; ++metric) {
      Numbers x = numbers(random, n * d), codes = numbers(random, count * d), bias = numbers(random, count);
      change(x, codes, bias, d);
      for (int way = 0; way < 3; ++way)
        test_case(kernels, {n, count, d, k, metric > 0, metric > 1, form, way > 0, way > 1}, x, codes, bias);
    }
  };
  const auto nothing = [](Numbers&, Numbers&, Numbers&, int64_t) {};
  // Numbers of codes around the edges of a panel and of a chunk; all of the codes or few of them.
  for (int64_t count : Sizes{1, p - 1, p, p + 1, 511, 512, 513, 1030})
    for (int64_t k : Sizes{1, p + 1, count})
      if (k <= count) test(3, count, 3, k, nothing);
  // Numbers of features around the edges of vectors, chains and slices; numbers of rows around those of a tile and of a
  // block.
  for (int64_t d : Sizes{1, p / 2 - 1, p / 2 + 1, p, 64, 65, 257}) test(r + 1, p + 2, d, 5, nothing);
  for (int64_t n : {0, 1, 128, 129}) test(n, 40, 2, 2, nothing);
  test(2 * r + 1, p + 1, 5000, 3, nothing);
  for (Form form : FORMS) test(2 * r + 3, 70, p / 2 + 3, 9, nothing, form);

  struct {
    int64_t n, count, d, k;
  } const sizes[] = {{9, 31, 3, 4}, {8, 40, 5, 1}, {6, 1100, 2, 600}, {5, 600, 7, 100}, {12, 3 * p + 1, 17, 3 * p + 1}};
  for (const auto& [n, count, d, k] : sizes) {
    test(n, count, d, k, [&](Numbers& x, Numbers& codes, Numbers& bias, int64_t) {
      // Nearly all scores tie exactly.
      for (Numbers* values : {&x, &codes, &bias})
        for (float& value : *values) value = std::round(value);
    });
    test(n, count, d, k, [&](Numbers&, Numbers& codes, Numbers& bias, int64_t features) {
      // Codes that float32 does not distinguish.
      for (int64_t i = (int64_t)codes.size() - 1; i >= 0; --i) codes[i] = codes[i % features] + codes[i] * 0x1p-22f;
      std::fill(bias.begin(), bias.end(), 1.0f);
    });
    test(n, count, d, k, [](Numbers&, Numbers& codes, Numbers& bias, int64_t) {
      std::fill(codes.begin(), codes.end(), 0.0f);
      std::fill(bias.begin(), bias.end(), 0.0f);
    });
    for (float factor : {1e-18f, 1e17f})
      test(n, count, d, k, [&](Numbers& x, Numbers& codes, Numbers&, int64_t) {
        x = times(x, factor);
        codes = times(codes, factor);
      });
    // Rows, codes and biases that are not finite: some of them, or all.
    test(n, count, d, k, [&](Numbers& x, Numbers&, Numbers&, int64_t features) { spoil(random, x, features); });
    test(n, count, d, k, [&](Numbers& x, Numbers& codes, Numbers& bias, int64_t features) {
      spoil(random, x, features);
      spoil(random, codes, features);
      spoil(random, bias, 1);
    });
    for (float value : {NAN, INFINITY})
      test(n, count, d, k, [&](Numbers&, Numbers& codes, Numbers&, int64_t) {
        std::fill(codes.begin(), codes.end(), value);
      });
  }
}

}  // namespace dlvae
