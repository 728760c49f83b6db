// Sums of rows by code and of atoms, and elementwise passes, against plain loops. Sums of whole numbers are exact.
#include <algorithm>
#include <numeric>

#include "check.h"

namespace dlvae {
namespace {

// Pairs of a row and a code, sorted by code in the same way as in the library.
struct Pairs {
  Pairs(Random& random, int64_t rows, int64_t per_row, int64_t codes) : of_row(rows * per_row), starts(codes + 1) {
    // Code 0 has no pairs, and neither has the last of more than 2 codes.
    for (int64_t& code : of_row) code = codes > 2 ? 1 + random.below(codes - 2) : codes - 1;
    for (int64_t code = 0; code < codes; ++code) {
      starts[code] = (int64_t)order.size();
      for (int64_t p = 0; p < rows * per_row; ++p)
        if (of_row[p] == code) order.push_back(p);
    }
    starts[codes] = (int64_t)order.size();
    for (int64_t p : order) row_numbers.push_back((uint32_t)(p / per_row));
    row_numbers.shrink_to_fit();
  }
  std::vector<int64_t> of_row, starts, order;
  std::vector<uint32_t> row_numbers;
};

// Computes the sums with `count` shares, of rows in blocks of `block` rows, each in memory of its own.
Numbers sums_of(
    const Kernels& kernels, const Segments& segments, const Numbers& data, int64_t rows, int64_t features,
    int64_t count, int64_t block, int64_t padding, bool is_far) {
  const int64_t ld = features + padding, columns = (features + 15) / 16, all = segments.codes * columns;
  Numbers sums((segments.codes - 1) * ld + features, NAN);
  std::vector<Share> shares(count);
  std::vector<std::vector<int64_t>> places;
  std::vector<double> totals(std::min(segments.codes, segments.starts[segments.codes] / SUM_CHAIN + 1) * features, NAN);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t from = all * i / count, to = all * (i + 1) / count;
    shares[i] = {from / columns, from % columns * 16, to / columns, to % columns * 16};
    places.emplace_back(shares[i].last_code + (shares[i].last_feature > 0) - shares[i].first_code, -1);
  }
  for (int64_t begin = 0; begin == 0 || begin < rows; begin += block) {
    const int64_t end = std::min(begin + block, rows), n = end - begin;
    Numbers part(n == 0 ? 0 : (n - 1) * ld + features, NAN);
    for (int64_t r = 0; r < n; ++r) std::copy_n(&data[(begin + r) * features], features, &part[r * ld]);
    for (int64_t i = 0; i < count; ++i)
      kernels.sum_segments(
          segments, shares[i], begin, end, part.data(), ld, is_far, places[i].data(), totals.data(), sums.data(),
          features, ld);
  }
  Numbers found(segments.codes * features);
  for (int64_t code = 0; code < segments.codes; ++code) {
    std::copy_n(&sums[code * ld], features, &found[code * features]);
    for (int64_t i = code * ld + features; i < (code + 1) * ld && i < (int64_t)sums.size(); ++i)
      CHECK(std::isnan(sums[i]), "written behind code %ld", (long)code);
  }
  return found;
}

void test_segments(
    const Kernels& kernels, Random& random, int64_t rows, int64_t per_row, int64_t codes, int64_t features) {
  const Pairs pairs(random, rows, per_row, codes);
  const int64_t count = rows * per_row;
  const Numbers whole = whole_numbers(random, rows * features, 9), weights = whole_numbers(random, count, 9);
  for (bool has_weights : {false, true}) {
    Numbers sorted(count), expected(codes * features);
    for (int64_t p = 0; p < count; ++p) {
      sorted[p] = weights[pairs.order[p]];
      const float weight = has_weights ? weights[p] : 3;
      for (int64_t d = 0; d < features; ++d)
        expected[pairs.of_row[p] * features + d] += weight * whole[p / per_row * features + d];
    }
    const float* const each = has_weights ? sorted.data() : nullptr;
    const Segments segments{codes, pairs.starts.data(), pairs.row_numbers.data(), each, 3};
    for (int64_t shares : {1, 2, 5})
      for (int64_t block : {rows + 1, rows / 3 + 1}) {
        const bool is_far = block > rows;
        const Numbers found = sums_of(kernels, segments, whole, rows, features, shares, block, shares == 2, is_far);
        for (int64_t i = 0; i < codes * features; ++i)
          CHECK(
              found[i] == expected[i], "code %ld, feature %ld of %ld: %g, not %g", (long)(i / features),
              (long)(i % features), (long)features, found[i], expected[i]);
      }
  }
  // The order of a sum is that of the pairs, for any number of shares.
  const Numbers real = numbers(random, rows * features), factors = numbers(random, count);
  const Segments segments{codes, pairs.starts.data(), pairs.row_numbers.data(), factors.data(), 0};
  const Numbers once = sums_of(kernels, segments, real, rows, features, 1, rows + 1, 0, false);
  const Numbers in_parts = sums_of(kernels, segments, real, rows, features, 3, rows / 2 + 1, 3, true);
  CHECK(are_same(once, in_parts), "shares change sums of %ld features", (long)features);
}

void test_atoms(
    const Kernels& kernels, Random& random, Form form, int64_t rows, int64_t k, int64_t codes, int64_t features) {
  const Numbers dictionary = whole_numbers(random, codes * features, 2), values = whole_numbers(random, rows * k, 2);
  std::vector<int64_t> indices(rows * k);
  for (int64_t& index : indices) index = random.below(codes);
  Atoms atoms{dictionary.data(), features, indices.data(), rows, k, false};
  Numbers sums(rows * features);
  for (int64_t p = 0; p < rows * k; ++p)
    for (int64_t d = 0; d < features; ++d)
      sums[p / k * features + d] += values[p] * dictionary[indices[p] * features + d];
  const Tensor rounded(kernels, form, sums, rows, features);
  const Numbers expected = rounded.values();
  for (bool is_far : {false, true}) {
    atoms.is_far = is_far;
    const Tensor out(kernels, form, Numbers(rows * features, NAN), rows, features);
    kernels.decode_rows(atoms, values.data(), rows / 3, rows, out.rows);
    kernels.decode_rows(atoms, values.data(), 0, rows / 3, out.rows);
    CHECK(are_same(out.values(), expected), "%ld atoms of %ld features: a wrong sum", (long)k, (long)features);

    const Tensor x(kernels, form, whole_numbers(random, rows * features, 2), rows, features);
    const Numbers row = x.values();
    Numbers products(rows * k, NAN);
    kernels.atom_products(atoms, x.rows, rows / 3, rows, products.data());
    kernels.atom_products(atoms, x.rows, 0, rows / 3, products.data());
    for (int64_t p = 0; p < rows * k; ++p) {
      const float *a = &row[p / k * features], *b = &dictionary[indices[p] * features];
      double product = 0;
      for (int64_t d = 0; d < features; ++d) product += a[d] * b[d];
      CHECK(
          products[p] == product, "atom %ld of %ld, %ld features: %g, not %g", (long)(p % k), (long)k, (long)features,
          products[p], product);
    }
  }
}

// A sum of equal rows is as exact as one chain, for any number of rows.
void test_equal_rows(const Kernels& kernels, int64_t rows) {
  const std::vector<int64_t> starts{0, rows};
  std::vector<uint32_t> numbers(rows);
  std::iota(numbers.begin(), numbers.end(), 0);
  const Segments segments{1, starts.data(), numbers.data(), nullptr, 1};
  for (float value : {1.1f, 1.0000075f, 1.7f, 1.999f})
    for (int64_t block : {rows, rows / 7}) {
      const double sum = sums_of(kernels, segments, Numbers(rows, value), rows, 1, 1, block, 0, false)[0];
      const double exact = (double)rows * value;
      CHECK(std::abs(sum - exact) <= 2e-6 * exact, "%ld rows of %g: %.9g, not %.9g", (long)rows, value, sum, exact);
    }
}

void test_copies(
    const Kernels& kernels, Random& random, int64_t rows, int64_t heads, int64_t codes, int64_t row_bytes) {
  const int64_t stride = row_bytes + 6, head_stride = codes * stride;
  std::vector<char> from((heads * codes - 1) * stride + row_bytes), to(rows * row_bytes);
  for (char& byte : from) byte = (char)random.bits();
  std::vector<int64_t> indices(rows);
  for (int64_t& index : indices) index = random.below(codes + 1) - 1;
  const CodeRows book{from.data(), stride, heads, head_stride, row_bytes};
  kernels.copy_rows(book, indices.data(), rows / 3, rows, to.data());
  kernels.copy_rows(book, indices.data(), 0, rows / 3, to.data());
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t b = 0; b < row_bytes; ++b) {
      const char expected = indices[i] < 0 ? 0 : from[i % heads * head_stride + indices[i] * stride + b];
      CHECK(to[i * row_bytes + b] == expected, "byte %ld of %ld", (long)b, (long)row_bytes);
    }
}

void check_close(float found, double expected, double size, Form form) {
  const double allowed = 3e-7 * size + rounding_of(form, expected);
  CHECK(std::abs(found - expected) <= allowed, "%g, not %g", found, expected);
}

void test_ema(const Kernels& kernels, Random& random, Form form, int64_t codes, int64_t features, float weight) {
  const int64_t ld = features + 1;
  const Form state{Type::float32, form.padding, form.is_transposed};
  const Tensor codebook(kernels, state, numbers(random, codes * features), codes, features);
  const Tensor sum(kernels, state, numbers(random, codes * features), codes, features);
  const Tensor statistics(kernels, form, numbers(random, codes * ld), codes, ld);
  const Numbers code = codebook.values(), old = sum.values(), add = statistics.values();
  Numbers sizes(codes);
  for (int64_t i = 0; i < codes; ++i) sizes[i] = i % 3 == 1 ? 0 : 1 + std::abs(random.number());
  kernels.ema_rows(codebook.rows, sum.rows, statistics.rows, sizes.data(), weight, codes / 3, codes);
  kernels.ema_rows(codebook.rows, sum.rows, statistics.rows, sizes.data(), weight, 0, codes / 3);
  const Numbers new_code = codebook.values(), new_sum = sum.values();
  for (int64_t i = 0; i < codes * features; ++i) {
    const float a = old[i], b = add[i / features * ld + i % features];
    const double expected = a + (double)weight * ((double)b - a), size = std::abs(a) + std::abs(b);
    if (weight == 0) CHECK(new_sum[i] == a, "%g, not %g", new_sum[i], a);
    if (weight == 1) CHECK(new_sum[i] == b, "%g, not %g", new_sum[i], b);
    check_close(new_sum[i], expected, size, state);
    if (sizes[i / features] == 0) {
      CHECK(new_code[i] == code[i], "a code without rows went from %g to %g", code[i], new_code[i]);
    } else {
      check_close(new_code[i], expected / sizes[i / features], size, state);
    }
  }
}

void test_subtraction(const Kernels& kernels, Random& random, Form form, Form other, int64_t rows, int64_t features) {
  const Tensor a(kernels, form, numbers(random, rows * features), rows, features);
  const Tensor b(kernels, other, numbers(random, rows * features), rows, features);
  const Tensor out(kernels, form, Numbers(rows * features, NAN), rows, features);
  kernels.subtract_scaled(a.rows, b.rows, 0.3f, out.rows, rows / 3, rows);
  kernels.subtract_scaled(a.rows, b.rows, 0.3f, out.rows, 0, rows / 3);
  const Numbers x = a.values(), y = b.values(), z = out.values();
  for (int64_t i = 0; i < rows * features; ++i)
    check_close(z[i], x[i] - 0.3f * (double)y[i], std::abs(x[i]) + std::abs(y[i]), form);
}

void test_rotation(const Kernels& kernels, Random& random, Form form, Form other, int64_t rows, int64_t features) {
  Numbers x_values = numbers(random, rows * features), q_values = numbers(random, rows * features);
  // Opposite directions, and a row of zeros.
  for (int64_t d = 0; rows > 2 && d < features; ++d) q_values[d] = -x_values[d], x_values[features + d] = 0;
  const Tensor grad(kernels, other, numbers(random, rows * features), rows, features);
  const Tensor x(kernels, form, x_values, rows, features), q(kernels, other, q_values, rows, features);
  const Tensor out(kernels, form, Numbers(rows * features, NAN), rows, features);
  kernels.rotate_rows(grad.rows, x.rows, q.rows, out.rows, rows / 3, rows);
  kernels.rotate_rows(grad.rows, x.rows, q.rows, out.rows, 0, rows / 3);
  const Numbers gs = grad.values(), xs = x.values(), qs = q.values(), found = out.values();
  for (int64_t r = 0; r < rows; ++r) {
    const float *g = &gs[r * features], *e = &xs[r * features], *t = &qs[r * features];
    double x_squares = 0, q_squares = 0, s_squares = 0, grad_s = 0, grad_t = 0, size = 0;
    for (int64_t d = 0; d < features; ++d) x_squares += (double)e[d] * e[d], q_squares += (double)t[d] * t[d];
    const double x_norm = std::max(std::sqrt(x_squares), 1e-6), q_norm = std::max(std::sqrt(q_squares), 1e-6);
    for (int64_t d = 0; d < features; ++d) {
      const double s = e[d] / x_norm + t[d] / q_norm;
      s_squares += s * s, grad_s += g[d] * s, grad_t += g[d] * (t[d] / q_norm), size += std::abs(g[d]);
    }
    // The direction of a short sum has a large error.
    if (s_squares > 1e-12 && s_squares < 1e-4) continue;
    const double along_s = s_squares < 1e-12 ? 0 : 2 * grad_s / s_squares, scale = std::sqrt(q_squares) / x_norm;
    for (int64_t d = 0; d < features; ++d) {
      const double expected = g[d] - along_s * (e[d] / x_norm + t[d] / q_norm) + 2 * grad_t * e[d] / x_norm;
      if (form.type == Type::float16 && std::abs(scale * expected) > 65000) continue;
      check_close(found[r * features + d], scale * expected, 1e3 * scale * size, form);
    }
  }
}

}  // namespace

void test_sums(const Kernels& kernels) {
  Random random;
  // Numbers of features around the edges of each number of vectors that are processed together.
  const int64_t w = kernels.panel / 2, most = 2 * kernels.rows * w;
  for (int64_t d : Sizes{1, 2, w - 1, w, w + 1, 2 * w + 3, 4 * w - 1, most / 2 + w + 2, most, most + 7 * w + 1}) {
    test_segments(kernels, random, 0, 1, 3, d);
    test_segments(kernels, random, 1, 1, 1, d);
    test_segments(kernels, random, 23, 1, 6, d);
    test_segments(kernels, random, 10, 3, 5, d);
    // Codes with several chains: few codes, and more codes than chains.
    test_segments(kernels, random, 3 * SUM_CHAIN + 1, 1, 2, d);
    test_segments(kernels, random, 2 * SUM_CHAIN, 3, 4, d);
    test_segments(kernels, random, 2 * SUM_CHAIN + 40, 1, 4, d);
    for (int64_t k : Sizes{0, 1, w - 1, w, w + 1, 2 * w + 3, SUM_CHAIN + 1, 2 * SUM_CHAIN})
      test_atoms(kernels, random, PLAIN, 3, k, 9, d);
    for (Form form : FORMS) {
      test_atoms(kernels, random, form, 0, 2, 1, d);
      test_atoms(kernels, random, form, 1, w, 1, d);
      test_atoms(kernels, random, form, 34, 2, 9, d);
    }
  }
  test_equal_rows(kernels, 1 << 20);
  for (int64_t bytes : {0, 1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 128, 255, 256, 257, 330, 2100})
    for (int64_t n : {0, 1, 9, 20})
      for (int64_t heads : {1, 3}) test_copies(kernels, random, n, heads, 5, bytes);
  for (Form form : FORMS)
    for (int64_t d : Sizes{1, 2, w + 1, 255, 256})
      for (int64_t n : {0, 1, 2, 16, 17, 66, 130}) {
        for (float weight : {0.0f, 0.01f, 0.6f, 1.0f}) {
          if (n > 17 && d > 255 && weight != 0.01f) continue;
          test_ema(kernels, random, form, n, d, weight);
        }
        test_subtraction(kernels, random, form, form, n, d);
        test_subtraction(kernels, random, form, PLAIN, n, d);
        test_rotation(kernels, random, form, form, n, d);
        test_rotation(kernels, random, form, PLAIN, n, d);
      }
}

}  // namespace dlvae
