// What the tests of the kernels share. A std::vector made with its size is an allocation of just that size, so that the
// address sanitizer sees a byte beyond either end.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../cpu/kernels.h"

#define CHECK(condition, ...)                                                   \
  do {                                                                          \
    if (!(condition)) {                                                         \
      std::fprintf(stderr, "%s:%d: not %s: ", __FILE__, __LINE__, #condition);  \
      std::fprintf(stderr, __VA_ARGS__);                                        \
      std::fprintf(stderr, "\n");                                               \
      std::exit(1);                                                             \
    }                                                                           \
  } while (0)

namespace dlvae {

// The same numbers at every run, on every machine.
class Random {
 public:
  uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state_ >> 33) << 1 ^ (uint32_t)(state_ >> 40);
  }
  int64_t below(int64_t bound) { return bits() % bound; }
  // In (-1, 1).
  float number() { return (float)(int32_t)bits() * 0x1p-31f; }

 private:
  uint64_t state_ = 1;
};

inline std::vector<float> numbers(Random& random, int64_t count) {
  std::vector<float> values(count);
  for (float& value : values) value = random.number();
  return values;
}

// Rows [count, features] that lie side by side.
inline Rows adjacent_rows(std::vector<float>& values, int64_t count, int64_t features) {
  Rows rows{};
  rows.data = values.data();
  rows.type = Type::float32;
  rows.count = count;
  rows.features = features;
  rows.stride = 1;
  rows.dims = 1;
  rows.sizes[0] = count;
  rows.strides[0] = features;
  return rows;
}

void test_rows(const Kernels& kernels);
void test_search(const Kernels& kernels);
void test_softmax(const Kernels& kernels);
void test_topk(const Kernels& kernels);

}  // namespace dlvae
