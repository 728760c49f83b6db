// search_rows and quantize_rows against all distances in float64.
#include <algorithm>
#include <cmath>

#include "check.h"

namespace dlvae {
namespace {

// Parameters of packing, which the library derives from the lengths of the codes.
struct Packing {
  bool is_centred, is_spread, leaves_out_repeated;
};
constexpr Packing PACKINGS[] = {
    {false, false, false}, {false, false, true}, {false, true, true}, {true, false, true}, {true, true, false}};

// A codebook that is measured and packed in the same way as in the library.
struct Packed {
  Packed(const Kernels& kernels, const Numbers& codes, int64_t count, int64_t features, Packing packing)
      : centred(codes),
        centre(codes.begin(), codes.begin() + features),
        peaks(count),
        losses(count),
        hashes(count),
        norms(count) {
    const int64_t panels = (count + kernels.panel - 1) / kernels.panel;
    for (int64_t i = 0; i < count * features; ++i) centred[i] -= centre[i % features];
    const bool has_centre = packing.is_centred && std::all_of(centre.begin(), centre.end(), [](float value) {
                              return std::abs(value) < 1e30f;
                            });
    book.codes = codes.data();
    book.centred = has_centre ? centred.data() : codes.data();
    book.centre = has_centre ? centre.data() : nullptr;
    book.is_spread = packing.is_spread;
    book.count = count;
    book.features = features;
    book.peaks = peaks.data();
    book.losses = losses.data();
    book.norms = norms.data();
    book.hashes = hashes.data();
    kernels.measure_codes(book, 0, count);
    for (int64_t k = 0; k < count; ++k)
      for (int64_t j = 0; j < k && packing.leaves_out_repeated; ++j) {
        if (!std::equal(&codes[k * features], &codes[k * features] + features, &codes[j * features])) continue;
        CHECK(hashes[j] == hashes[k], "the equal codes %ld and %ld have different hashes", (long)j, (long)k);
        if (std::isfinite(peaks[k])) peaks[k] = INFINITY;
        break;
      }
    float peak = 0;
    double norm = 0;
    for (int64_t k = 0; k < count; ++k) {
      if (!std::isfinite(peaks[k])) continue;
      book.any_finite = true;
      peak = std::max(peak, peaks[k]);
      norm = std::max(norm, norms[k]);
    }
    const bool needs_scale = peak != 0 && (peak < 0x1p-20f || peak > 0x1p20f);
    book.scale = needs_scale ? std::ldexp(1.0f, std::clamp(-std::ilogb(peak), -100, 100)) : 1;
    book.peak = peak * book.scale;
    book.norm = (float)(norm * book.scale * (1 + 0x1p-22));
    book.steps = kernels.packed_steps(book);
    words.resize(panels * kernels.panel * book.steps);
    words.shrink_to_fit();
    start.resize(panels * kernels.panel);
    start.shrink_to_fit();
    book.words = words.data();
    book.start = start.data();
    kernels.pack_panels(book, 0, panels);
    book.loss = *std::max_element(losses.begin(), losses.end());
  }

  Codebook book{};
  Numbers centred, centre, peaks, losses, start;
  std::vector<uint32_t> hashes;
  std::vector<double> norms;
  std::vector<uint32_t> words;
};

double distance_of(const float* x, const float* c, int64_t features) {
  double sum = 0;
  for (int64_t d = 0; d < features; ++d) sum += ((double)x[d] - c[d]) * ((double)x[d] - c[d]);
  return sum;
}

bool has_nan(const float* v, int64_t features) {
  return std::any_of(v, v + features, [](float value) { return std::isnan(value); });
}

void check_index(const Numbers& codes, int64_t count, const float* x, int64_t features, int64_t index, int64_t row) {
  CHECK(index >= 0 && index < count, "row %ld has code %ld of %ld", (long)row, (long)index, (long)count);
  if (has_nan(x, features)) {
    CHECK(index == 0, "row %ld holds NaN and has code %ld", (long)row, (long)index);
    return;
  }
  int64_t first = -1;
  double best = INFINITY;
  bool any_number = false;
  for (int64_t k = 0; k < count; ++k) {
    const double distance = distance_of(x, &codes[k * features], features);
    any_number |= !has_nan(&codes[k * features], features);
    if (distance < best) {
      best = distance;
      first = k;
    }
  }
  const bool is_nan_code = has_nan(&codes[index * features], features);
  CHECK(!any_number || !is_nan_code, "row %ld has the code %ld, which holds NaN", (long)row, (long)index);
  if (first < 0) return;  // all distances are infinite
  const double found = distance_of(x, &codes[index * features], features);
  // Both sums are in float64, but in a different order.
  const bool is_best = found == best ? index == first : found <= best * (1 + 1e-13);
  CHECK(is_best, "row %ld has code %ld at %g, and not %ld at %g", (long)row, (long)index, found, (long)first, best);
}

// A few rows without a packed codebook, with the codes in two partitions.
void test_few(
    const Kernels& kernels, const Numbers& x, const Numbers& codes, int64_t n, int64_t count, int64_t features) {
  Codebook book{};
  book.codes = codes.data();
  book.count = count;
  book.features = features;
  const int64_t ld = (features + 15) / 16 * 16;
  Numbers rows((n + 3) / 4 * 4 * ld);
  rows.shrink_to_fit();
  for (int64_t r = 0; r < n; ++r) std::copy_n(&x[r * features], features, &rows[r * ld]);
  std::vector<Found> found(n), rest(n);
  kernels.search_few(book, rows.data(), ld, n, 0, count / 3, found.data());
  kernels.search_few(book, rows.data(), ld, n, count / 3, count, rest.data());
  for (int64_t r = 0; r < n; ++r) {
    const float* row = &x[r * features];
    const Found best = rest[r].index >= 0 && found[r].loses_to(rest[r].distance, rest[r].index) ? rest[r] : found[r];
    const bool is_finite = std::all_of(row, row + features, [](float value) { return std::isfinite(value); });
    CHECK(is_finite || best.index < 0, "row %ld is not finite and has code %ld", (long)r, (long)best.index);
    if (best.index >= 0) check_index(codes, count, row, features, best.index, r);
    if (is_finite && best.index < 0)
      for (int64_t k = 0; k < count; ++k)
        CHECK(has_nan(&codes[k * features], features), "row %ld has no code, not even %ld", (long)r, (long)k);
  }
}

// Rows without a code, whose indices and flags are those of one head of two.
void test_mask(
    const Kernels& kernels, const Codebook& book, const Rows& x, const std::vector<int64_t>& indices,
    const Numbers& quantized, const std::vector<double>& losses) {
  const int64_t n = x.count, features = x.features;
  std::vector<int64_t> found(2 * n, -7);
  std::vector<uint8_t> mask(2 * n);
  for (int64_t r = 0; r < n; ++r) mask[2 * r] = r % 3 != 1;
  Numbers masked(n * features, 1), half_error(n * features, 1);
  std::vector<double> less(losses.size());
  const Rows to = adjacent_rows(masked, n, features), errors = adjacent_rows(half_error, n, features);
  const bool* flags = reinterpret_cast<const bool*>(mask.data());
  kernels.quantize_rows(book, x, 0, n, 2, found.data(), flags, to, errors, less.data());
  for (int64_t r = 0; r < n; ++r) {
    const int64_t index = mask[2 * r] ? indices[r] : -1;
    CHECK(found[2 * r] == index && found[2 * r + 1] == -7, "row %ld has code %ld", (long)r, (long)found[2 * r]);
    for (int64_t i = r * features; i < (r + 1) * features; ++i) {
      const float expected = mask[2 * r] ? quantized[i] : 0;
      CHECK(masked[i] == expected || std::isnan(expected), "row %ld is %g", (long)r, masked[i]);
      CHECK(mask[2 * r] || half_error[i] == 0, "half the error of row %ld is %g", (long)r, half_error[i]);
    }
  }
  for (size_t block = 0; block < losses.size(); ++block)
    CHECK(!(less[block] > losses[block] * (1 + 1e-6)), "a loss of %g, above %g", less[block], losses[block]);
}

void test_packing(
    const Kernels& kernels, Numbers x, const Numbers& codes, int64_t n, int64_t count, int64_t features,
    Packing packing) {
  const Packed packed(kernels, codes, count, features, packing);
  const Rows rows = adjacent_rows(x, n, features);
  std::vector<int64_t> indices(n, -1), alone(n, -1), again(n, -1);
  Numbers distances(n);
  kernels.search_rows(packed.book, rows, 0, n, 1, indices.data(), distances.data());
  for (int64_t r = 0; r < n; ++r) {
    check_index(codes, count, &x[r * features], features, indices[r], r);
    const double exact = distance_of(&x[r * features], &codes[indices[r] * features], features);
    const bool is_close = std::isnan(exact)
                              ? std::isnan(distances[r])
                              : std::abs(distances[r] - exact) <= 1e-6 * exact || distances[r] == (float)exact;
    CHECK(is_close, "distance %g, not %g", distances[r], exact);
  }
  kernels.search_rows(packed.book, rows, 0, std::min(n, BLOCK), 1, alone.data(), nullptr);
  if (n > BLOCK) kernels.search_rows(packed.book, rows, BLOCK, n, 1, alone.data(), nullptr);
  CHECK(alone == indices, "the parts of a search differ from the whole");
  std::vector<Found> known(n);
  for (int64_t r = 0; r < n; ++r) known[r] = {0, indices[r]};
  Codebook unpacked{};
  unpacked.codes = codes.data();
  unpacked.count = count;
  unpacked.features = features;
  unpacked.found = known.data();
  Numbers known_distances(n);
  kernels.search_rows(unpacked, rows, 0, n, 1, alone.data(), known_distances.data());
  CHECK(alone == indices && are_same(distances, known_distances), "codes that are known come out as others");

  Numbers quantized(n * features), half_error(n * features);
  std::vector<double> losses((n + BLOCK - 1) / BLOCK);
  Rows none{};
  const Rows to = adjacent_rows(quantized, n, features), error_rows = adjacent_rows(half_error, n, features);
  kernels.quantize_rows(packed.book, rows, 0, n, 1, again.data(), nullptr, to, error_rows, losses.data());
  CHECK(again == indices, "the codes of quantize_rows differ from those of search_rows");
  for (size_t block = 0; block < losses.size(); ++block) {
    double loss = 0;
    for (int64_t r = (int64_t)block * BLOCK; r < std::min<int64_t>(n, (block + 1) * BLOCK); ++r)
      for (int64_t d = 0; d < features; ++d) {
        const float code = codes[indices[r] * features + d], difference = code - x[r * features + d];
        const bool is_same_code = quantized[r * features + d] == code || std::isnan(code);
        CHECK(is_same_code, "row %ld is %g, not %g", (long)r, quantized[r * features + d], code);
        const float half = half_error[r * features + d];
        const bool is_same = half == difference / 2 || std::isnan(difference);
        CHECK(is_same, "half the error of row %ld is %g, not %g", (long)r, half, difference / 2);
        loss += (double)difference * difference;
      }
    // Squares are in float32.
    const bool is_finite = loss < 1e38;
    CHECK(
        !is_finite || std::abs(losses[block] - loss) <= 1e-5 * loss + 1e-40, "a loss of %g, not %g", losses[block],
        loss);
  }
  kernels.quantize_rows(packed.book, rows, 0, n, 1, again.data(), nullptr, to, none, losses.data());
  CHECK(again == indices, "the codes of quantize_rows differ without errors");
  test_mask(kernels, packed.book, rows, indices, quantized, losses);
}

void test_case(
    const Kernels& kernels, const Numbers& x, const Numbers& codes, int64_t n, int64_t count, int64_t features) {
  for (const Packing& packing : PACKINGS) test_packing(kernels, x, codes, n, count, features, packing);
  const int64_t few = std::min<int64_t>(n, FEW_ROWS);
  for (int64_t rows = 1; rows <= few; rows += rows < 5 ? 1 : 4) test_few(kernels, x, codes, rows, count, features);
}

// Each code has a neighbour whose distance is larger by less than the error of any arithmetic: every row is searched a
// second time.
void test_uncertain(const Kernels& kernels, Random& random, int64_t n, int64_t count, int64_t d) {
  const Numbers x = numbers(random, n * d), apart = numbers(random, count * d);
  Numbers codes(2 * count * d);
  for (int64_t k = 0; k < 2 * count; ++k) {
    std::copy_n(&apart[k / 2 * d], d, &codes[k * d]);
    if (k % 2 == 1) codes[k * d] += 1e-6f;
  }
  const Packed packed(kernels, codes, 2 * count, d, PACKINGS[0]);
  Numbers copy = x;
  const Rows rows = adjacent_rows(copy, n, d);
  std::vector<int64_t> indices(n, -1);
  const int64_t uncertain = kernels.search_rows(packed.book, rows, 0, n, 1, indices.data(), nullptr);
  CHECK(uncertain == n, "%ld of %ld rows were searched twice", (long)uncertain, (long)n);
  for (int64_t r = 0; r < n; ++r) check_index(codes, 2 * count, &x[r * d], d, indices[r], r);
}

// Features that leave the largest possible low terms in bfloat16. The products of the low terms of the vector and of
// the two codes have opposite signs, which moves the farther code before the nearest one.
void test_largest_low_terms(const Kernels& kernels, int64_t d) {
  constexpr int64_t N = 20;
  const float below = 1 + 0x1p-8f - 0x1p-16f - 0x1p-23f, above = 1 + 0x1p-8f + 0x1p-16f;
  Numbers x(N * d, below), codes(2 * d, above);
  std::fill(codes.begin() + d, codes.end(), below);
  test_packing(kernels, x, codes, N, 2, d, PACKINGS[0]);
}

}  // namespace

void test_search(const Kernels& kernels) {
  Random random;
  for (int64_t d : {1, 2, 4}) test_largest_low_terms(kernels, d);
  const int64_t p = kernels.panel;
  // Numbers of codes around the edges of a panel, of panels that are processed together, and of a group; many codes for
  // few features.
  const int64_t counts[] = {1, 2, p - 1, p, p + 1, 4 * p, 4 * p + 1, 8 * p - 1, 8 * p + 1};
  for (int64_t d : {1, 2, 3, 7, 8, 9, 15, 16, 17, 33, 64})
    for (int64_t count : counts)
      for (int64_t n : {1, 9, 65}) {
        const Numbers x = numbers(random, n * d), codes = numbers(random, count * d);
        test_packing(kernels, x, codes, n, count, d, PACKINGS[random.below(5)]);
        test_few(kernels, x, codes, std::min<int64_t>(n, FEW_ROWS), count, d);
      }
  test_uncertain(kernels, random, 70, 5 * p + 1, 64);
  test_uncertain(kernels, random, 33, 600, 8);
  struct {
    int64_t n, count, d;
  } const sizes[] = {{130, 40, 5}, {70, 1300, 2}, {64, 1100, 1}, {66, 9 * p + 3, 12}, {20, 3 * p + 1, 2500}};
  for (const auto& [n, count, d] : sizes) {
    test_case(kernels, numbers(random, n * d), numbers(random, count * d), n, count, d);
    // Nearly all distances tie exactly.
    test_case(kernels, whole_numbers(random, n * d, 1), whole_numbers(random, count * d, 1), n, count, d);
    for (float factor : {1e-18f, 1e-3f, 1e18f})
      test_case(kernels, times(numbers(random, n * d), factor), times(numbers(random, count * d), factor), n, count, d);
    // Codes that differ only in low digits, and rows between them.
    Numbers codes = numbers(random, count * d), x = numbers(random, n * d);
    for (Numbers* values : {&codes, &x})
      for (float& value : *values) value = 1000 + 1e-3f * value;
    test_case(kernels, x, codes, n, count, d);
    codes = numbers(random, count * d), x = numbers(random, n * d);
    spoil(random, x, d);
    test_case(kernels, x, codes, n, count, d);
    spoil(random, codes, d);
    test_case(kernels, x, codes, n, count, d);
    codes = numbers(random, count * d), x = numbers(random, n * d);
    // Codes of very different lengths, and one much longer than all others.
    for (int64_t i = 0; i < count * d; ++i)
      codes[i] *= std::exp2((float)(i / d % 30) - 15) * (i / d == count / 2 ? 1e20f : 1);
    test_case(kernels, x, codes, n, count, d);
    test_case(kernels, x, Numbers(count * d, NAN), n, count, d);
    test_case(kernels, x, Numbers(count * d, INFINITY), n, count, d);
    test_case(kernels, x, Numbers(count * d, 0.0f), n, count, d);
  }
}

}  // namespace dlvae
