// Helpers for the tests of the kernels. A std::vector constructed with its size has an allocation of exactly that size,
// so that the address sanitizer detects an access one element beyond either end.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "../cpu/kernels.h"

#define CHECK(condition, ...) \
  do { \
    if (!(condition)) { \
      std::fprintf(stderr, "%s:%d: not %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__); \
      std::fprintf(stderr, "\n"); \
      std::exit(1); \
    } \
  } while (0)

namespace dlvae {

// A generator of the same numbers at every run on every machine.
class Random {
 public:
  uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state_ >> 33) << 1 ^ (uint32_t)(state_ >> 40);
  }
  int64_t below(int64_t bound) { return bits() % bound; }
  // A number in (-1, 1).
  float number() { return (float)(int32_t)bits() * 0x1p-31f; }

 private:
  uint64_t state_ = 1;
};

using Numbers = std::vector<float>;
using Sizes = std::initializer_list<int64_t>;

inline Numbers numbers(Random& random, int64_t count) {
  Numbers values(count);
  for (float& value : values) value = random.number();
  return values;
}

// Products of whole numbers and their sums are exact in any order.
inline Numbers whole_numbers(Random& random, int64_t count, int64_t most) {
  Numbers values(count);
  for (float& value : values) value = (float)(random.below(2 * most + 1) - most);
  return values;
}

inline Numbers times(Numbers values, float factor) {
  for (float& value : values) value *= factor;
  return values;
}

// Overwrites six random elements: NaN, infinities, two huge numbers and a subnormal one.
inline void spoil(Random& random, Numbers& values, int64_t features) {
  const float odd[] = {NAN, INFINITY, -INFINITY, 1e30f, 3e38f, 1e-45f};
  const int64_t count = (int64_t)values.size() / features;
  for (float value : odd) values[random.below(count) * features + random.below(features)] = value;
}

inline bool are_same(const Numbers& a, const Numbers& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

// Returns contiguous rows [count, features].
inline Rows adjacent_rows(Numbers& values, int64_t count, int64_t features) {
  return contiguous_rows(values.data(), count, features);
}

// The memory layout of a tensor of rows.
struct Form {
  Type type;
  int64_t padding;     // elements between rows
  bool is_transposed;  // the rows of each feature are adjacent
};
constexpr Form PLAIN{Type::float32, 0, false};
constexpr Form FORMS[] = {
    PLAIN, {Type::float32, 3, false}, {Type::float32, 0, true}, {Type::bfloat16, 3, false}, {Type::float16, 0, true}};

// Returns the largest rounding error of storing a number. float16 has steps of 2^-24 below its smallest normal number.
inline double rounding_of(Form form, double value) {
  if (form.type == Type::float16) return 0x1.02p-11 * std::abs(value) + 0x1p-24;
  return form.type == Type::bfloat16 ? 0x1.02p-8 * std::abs(value) : 0;
}

// A tensor [count, features] whose allocation begins and ends with its elements. It relies on load_rows and store_rows,
// which are tested first.
class Tensor {
 public:
  Tensor(const Kernels& kernels, Form form, const Numbers& values, int64_t count, int64_t features)
      : kernels_(kernels), form_(form), size_(form.type == Type::float32 ? 4 : 2) {
    const int64_t ld = form.is_transposed ? 1 : features + form.padding;
    const bool is_empty = count == 0 || features == 0;
    memory_.assign(
        is_empty ? 0 : (form.is_transposed ? count * features : (count - 1) * ld + features) * size_, UNUSED);
    memory_.shrink_to_fit();
    rows = Rows{memory_.data(), form.type, count, features, form.is_transposed ? count : 1, 1, {count}, {ld}};
    kernels.store_rows(rows, 0, count, values.data(), features);
  }
  Tensor(const Tensor&) = delete;
  Rows rows;

  // Returns the stored values after checking that the gaps between rows have not changed.
  Numbers values() const {
    const int64_t count = rows.count, features = rows.features;
    for (int64_t row = 0; row + 1 < count && !form_.is_transposed && features > 0; ++row)
      for (int64_t i = features * size_; i < (features + form_.padding) * size_; ++i)
        CHECK(memory_[row * (features + form_.padding) * size_ + i] == UNUSED, "written behind row %ld", (long)row);
    Numbers found(count * features);
    kernels_.load_rows(rows, 0, count, found.data(), features);
    return found;
  }

 private:
  static constexpr uint8_t UNUSED = 0xa5;
  const Kernels& kernels_;
  Form form_;
  int64_t size_;
  std::vector<uint8_t> memory_;
};

void test_rows(const Kernels& kernels);
void test_search(const Kernels& kernels);
void test_residual(const Kernels& kernels);
void test_sums(const Kernels& kernels);
void test_topk(const Kernels& kernels);
void test_softmax(const Kernels& kernels);
void test_entropy(const Kernels& kernels);

}  // namespace dlvae
