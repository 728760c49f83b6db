// load_rows and store_rows: every 16-bit number, and rows of any strides around the edges of every tile.
#include <cmath>
#include <cstring>

#include "check.h"

namespace dlvae {
namespace {

constexpr Type TYPES[] = {Type::float32, Type::bfloat16, Type::float16};

int64_t size_of(Type type) { return type == Type::float32 ? 4 : 2; }

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Returns the number that 16 bits represent, from the definition of the format.
double number_of(uint16_t bits, Type type) {
  const int digits = type == Type::float16 ? 10 : 7, bias = type == Type::float16 ? 15 : 127;
  const int exponent = (bits & 0x7fff) >> digits, fraction = bits & ((1 << digits) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == (0x7fff >> digits)) return fraction ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - digits);
  return sign * std::ldexp(fraction + (1 << digits), exponent - bias - digits);
}

bool are_same(float a, float b) { return (a != a && b != b) || (a == b && std::signbit(a) == std::signbit(b)); }

// Returns a tensor of one row.
Rows row_of(std::vector<uint16_t>& values, Type type) {
  Rows rows{};
  rows.data = values.data();
  rows.type = type;
  rows.count = rows.sizes[0] = 1;
  rows.features = rows.strides[0] = (int64_t)values.size();
  rows.stride = rows.dims = 1;
  return rows;
}

void test_every_number(const Kernels& kernels, Type type) {
  std::vector<uint16_t> all(65536), back(65536);
  for (int i = 0; i < 65536; ++i) all[i] = (uint16_t)i;
  std::vector<float> wide(65536);
  kernels.load_rows(row_of(all, type), 0, 1, wide.data(), 65536);
  for (int i = 0; i < 65536; ++i) CHECK(are_same(wide[i], (float)number_of(all[i], type)), "%04x gives %g", i, wide[i]);
  kernels.store_rows(row_of(back, type), 0, 1, wide.data(), 65536);
  for (int i = 0; i < 65536; ++i) {
    const bool is_kept = std::isnan(wide[i]) ? std::isnan(number_of(back[i], type)) : back[i] == all[i];
    CHECK(is_kept, "%04x comes back as %04x", i, back[i]);
  }
}

// Tests the midpoint of each number and the next larger one in magnitude, and its two neighbours.
void test_every_rounding(const Kernels& kernels, Type type) {
  const int infinity = type == Type::float16 ? 0x7c00 : 0x7f80;
  for (int side = -1; side <= 1; ++side) {
    std::vector<float> between(2 * infinity);
    std::vector<uint16_t> found(2 * infinity);
    for (int i = 0; i < 2 * infinity; ++i) {
      const uint16_t low = (uint16_t)(i % infinity);
      const double a = number_of(low, type);
      // Beyond the largest number, the step is as wide as the one before.
      const double b = low + 1 == infinity ? 2 * a - number_of(low - 1, type) : number_of(low + 1, type);
      const float half = (float)((a + b) / 2);
      const float value = side == 0 ? half : std::nextafterf(half, side < 0 ? 0 : INFINITY);
      between[i] = i < infinity ? value : -value;
    }
    kernels.store_rows(row_of(found, type), 0, 1, between.data(), 2 * infinity);
    for (int i = 0; i < 2 * infinity; ++i) {
      const int low = i % infinity;
      const int expected = (side < 0 || (side == 0 && low % 2 == 0) ? low : low + 1) | (i < infinity ? 0 : 0x8000);
      CHECK(found[i] == expected, "%a gives %04x, not %04x", between[i], found[i], expected);
    }
  }
  // Every bit of the payload of NaN.
  std::vector<float> nans;
  for (uint32_t bit = 0; bit < 23; ++bit)
    for (uint32_t sign : {0u, 0x80000000u})
      for (uint32_t payload : {1u << bit, (2u << bit) - 1}) nans.push_back(float_of(sign | 0x7f800000u | payload));
  std::vector<uint16_t> found(nans.size());
  kernels.store_rows(row_of(found, type), 0, 1, nans.data(), (int64_t)nans.size());
  for (uint16_t bits : found) CHECK(std::isnan(number_of(bits, type)), "NaN gives %04x", bits);
}

// Returns the offset of the first feature of a row, from the definition of strides.
int64_t offset_of(const Rows& rows, int64_t row) {
  int64_t offset = 0;
  for (int i = rows.dims - 1; i >= 0; --i) {
    offset += row % rows.sizes[i] * rows.strides[i];
    row /= rows.sizes[i];
  }
  return offset;
}

float load_one(const std::vector<uint8_t>& memory, Type type, int64_t at) {
  if (type == Type::float32) {
    float value;
    std::memcpy(&value, memory.data() + 4 * at, 4);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, memory.data() + 2 * at, 2);
  return (float)number_of(bits, type);
}

// Converts rows [begin, end) and back, in memory that ends with their last element.
void test_layout(const Kernels& kernels, Rows rows, Random& random) {
  int64_t last = rows.features > 0 ? (rows.features - 1) * rows.stride : 0;
  for (int i = 0; i < rows.dims; ++i) last += (rows.sizes[i] - 1) * rows.strides[i];
  const bool is_empty = rows.count == 0 || rows.features == 0;
  std::vector<uint8_t> memory(is_empty ? 0 : (last + 1) * size_of(rows.type));
  for (uint8_t& byte : memory) byte = (uint8_t)random.bits();
  rows.data = memory.data();
  const int64_t begins[] = {0, rows.count / 3, rows.count > 0 ? rows.count - 1 : 0},
                ends[] = {rows.count, (rows.count + 1) / 2};
  for (int64_t begin : begins)
    for (int64_t end : ends)
      for (int64_t padding : {0, 3}) {
        if (begin > end) continue;
        const int64_t count = end - begin, ld = rows.features + padding;
        const int64_t needed = count == 0 ? 0 : (count - 1) * ld + rows.features;
        std::vector<float> wide(needed, 7.0f);
        kernels.load_rows(rows, begin, end, wide.data(), ld);
        for (int64_t i = 0; i < needed; ++i) {
          const int64_t d = i % ld;
          const float expected = d >= rows.features
                                     ? 7.0f
                                     : load_one(memory, rows.type, offset_of(rows, begin + i / ld) + d * rows.stride);
          CHECK(
              are_same(wide[i], expected), "row %ld, feature %ld: %g, not %g", (long)(i / ld), (long)d, wide[i],
              expected);
        }
        std::vector<uint8_t> written = memory;
        rows.data = written.data();
        for (int64_t i = 0; i < needed; ++i) wide[i] = (float)(1 + i % 200);
        kernels.store_rows(rows, begin, end, wide.data(), ld);
        rows.data = memory.data();
        std::vector<uint8_t> is_written(memory.size());
        for (int64_t r = 0; r < count; ++r)
          for (int64_t d = 0; d < rows.features; ++d) {
            const int64_t at = offset_of(rows, begin + r) + d * rows.stride;
            std::memset(is_written.data() + at * size_of(rows.type), 1, size_of(rows.type));
            // Any of several rows that share memory may be the last one written.
            bool is_shared = false;
            for (int i = 0; i < rows.dims; ++i) is_shared |= rows.strides[i] == 0 && rows.sizes[i] > 1;
            const float stored = load_one(written, rows.type, at);
            CHECK(is_shared || stored == wide[r * ld + d], "stored %g, not %g", stored, wide[r * ld + d]);
          }
        for (size_t i = 0; i < memory.size(); ++i)
          CHECK(is_written[i] || written[i] == memory[i], "byte %zu changed", i);
      }
}

Rows layout(
    Type type, int64_t features, int64_t stride, std::initializer_list<int64_t> sizes,
    std::initializer_list<int64_t> strides) {
  Rows rows{};
  rows.type = type;
  rows.features = features;
  rows.stride = stride;
  rows.count = 1;
  for (int64_t size : sizes) rows.count *= rows.sizes[rows.dims++] = size;
  int i = 0;
  for (int64_t each : strides) rows.strides[i++] = each;
  return rows;
}

}  // namespace

void test_rows(const Kernels& kernels) {
  Random random;
  for (Type type : {Type::bfloat16, Type::float16}) {
    test_every_number(kernels, type);
    test_every_rounding(kernels, type);
  }
  for (Type type : TYPES)
    for (int64_t d : {0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 50})
      for (int64_t n : {0, 1, 2, 15, 16, 17, 33}) {
        test_layout(kernels, layout(type, d, 1, {n}, {d}), random);
        test_layout(kernels, layout(type, d, 1, {n}, {d + 3}), random);
        test_layout(kernels, layout(type, d, 2, {n}, {2 * d}), random);
        test_layout(kernels, layout(type, d, n + 1, {n}, {1}), random);
        test_layout(kernels, layout(type, d, n, {2, n}, {n * d, 1}), random);
        test_layout(kernels, layout(type, d, 1, {n, 3}, {d, 0}), random);
        test_layout(kernels, layout(type, d, 12, {2, n, 3}, {4, 12 * d, 1}), random);
      }
}

}  // namespace dlvae
