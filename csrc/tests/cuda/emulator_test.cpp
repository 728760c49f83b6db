// Tests of the emulator and, on it, of the building blocks of kernels.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "../../cuda/device.cuh"
#include "../check.h"

namespace dlvae {
namespace {

template <class F>
void run(dim3 grid, dim3 block, size_t shared_bytes, const F& kernel) {
  emulator::run("test", grid, block, shared_bytes, kernel);
}

template <class F>
std::string error_of(dim3 block, const F& kernel) {
  try {
    run(1, block, 64, kernel);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

bool holds(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

uint16_t bits_of(__half value) { return __half_as_ushort(value); }
uint16_t bits_of(__nv_bfloat16 value) { return __bfloat16_as_ushort(value); }

template <class T>
struct Matrices {
  T a[16][16], b[16][8], b_transposed[8][16];
  float expected[16][8];
};

// Whole numbers, whose sums are exact.
template <class T>
Matrices<T> matrices(Random& random) {
  Matrices<T> m{};
  float a[16][16], b[16][8];
  for (auto& row : a) {
    for (float& value : row) value = static_cast<float>(random.below(41) - 20);
  }
  for (auto& row : b) {
    for (float& value : row) value = static_cast<float>(random.below(41) - 20);
  }
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) from_float(a[i][k], &m.a[i][k]);
    for (int j = 0; j < 8; ++j) {
      from_float(b[i][j], &m.b[i][j]);
      m.b_transposed[j][i] = m.b[i][j];
      m.expected[i][j] = 1000.0f * i + j;
      for (int k = 0; k < 16; ++k) m.expected[i][j] += a[i][k] * b[k][j];
    }
  }
  return m;
}

template <class T>
uint32_t two(T low, T high) {
  return bits_of(low) | static_cast<uint32_t>(bits_of(high)) << 16;
}

template <class T>
void multiply_and_check(const Matrices<T>& m, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const int group = lane_index() / 4, pair = lane_index() % 4 * 2;
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = 1000.0f * (group + i / 2 * 8) + pair + i % 2;
  mma_m16n8k16<T>(sums, a, b);
  for (int i = 0; i < 4; ++i) {
    CHECK(sums[i] == m.expected[group + i / 2 * 8][pair + i % 2], "lane %d, element %d", lane_index(), i);
  }
}

template <class T>
void test_products() {
  Random random;
  const Matrices<T> m = matrices<T>(random);
  run(1, WARP, 0, [&] {
    const int group = lane_index() / 4, pair = lane_index() % 4 * 2;
    uint32_t a[4], b[2];
    for (int i = 0; i < 4; ++i) {
      const T* at = &m.a[group + i % 2 * 8][pair + i / 2 * 8];
      a[i] = two(at[0], at[1]);
    }
    for (int i = 0; i < 2; ++i) b[i] = two(m.b[pair + 8 * i][group], m.b[pair + 8 * i + 1][group]);
    multiply_and_check(m, a, b);
  });
  // Loads with ldmatrix from rows of a, from rows of the transpose of b and, transposing, from rows of b.
  run(1, 2 * WARP, sizeof(m), [&] {
    Matrices<T>& shared = *dynamic_shared<Matrices<T>>();
    if (threadIdx.x == 0) shared = m;
    __syncthreads();
    const int lane = lane_index();
    uint32_t a[4], b[2], same[4];
    ldmatrix_x4(a, &shared.a[lane % 16][lane / 16 * 8]);
    ldmatrix_x2(b, &shared.b_transposed[lane % 8][lane / 8 % 2 * 8]);
    multiply_and_check(m, a, b);
    ldmatrix_x4_trans(same, &shared.b[lane % 16][0]);
    CHECK(same[0] == b[0] && same[1] == b[1] && same[2] == b[0] && same[3] == b[1], "lane %d", lane);
  });
}

void test_lanes() {
  // The last warp has 5 lanes.
  run(3, 2 * WARP + 5, 0, [] {
    const int lane = lane_index(), number = static_cast<int>(threadIdx.x), lanes = number < 64 ? 32 : 5;
    CHECK(__shfl_sync(ALL_LANES, number, 3) == number - lane + 3, "%d", number);
    CHECK(__shfl_sync(ALL_LANES, lane, 9, 8) == lane / 8 * 8 + 1, "%d", lane);
    CHECK(__shfl_up_sync(ALL_LANES, lane, 2) == (lane < 2 ? lane : lane - 2), "%d", lane);
    CHECK(__shfl_up_sync(ALL_LANES, lane, 2, 4) == (lane % 4 < 2 ? lane : lane - 2), "%d", lane);
    const int below = __shfl_down_sync(ALL_LANES, lane, 2);
    CHECK(below == (lane + 2 < lanes ? lane + 2 : lanes == 32 ? lane : -1), "%d", lane);
    CHECK(__ballot_sync(ALL_LANES, lane % 3 == 0) == (lanes == 32 ? 0x49249249 : 0x9), "%d", lane);
    CHECK(rank_in(0x49249249) == (lane + 2) / 3, "%d", lane);
    CHECK(__any_sync(ALL_LANES, lane == 4) && !__all_sync(ALL_LANES, lane == 4), "%d", lane);
    CHECK(__reduce_add_sync(ALL_LANES, lane) == lanes * (lanes - 1) / 2, "%d", lane);
    CHECK(__reduce_max_sync(ALL_LANES, -lane) == 0 && __reduce_min_sync(ALL_LANES, -lane) == 1 - lanes, "%d", lane);
  });
  run(1, WARP, 0, [] {
    const int lane = lane_index();
    CHECK(warp_reduce(static_cast<double>(lane), Sum()) == 496, "%d", lane);
    CHECK(warp_reduce<8>(lane, Least()) == lane / 8 * 8, "%d", lane);
    // Two halves of a warp work at the same time, with different numbers of operations.
    const uint32_t half = lane < 16 ? 0xffff : 0xffff0000;
    for (int i = 0; i <= lane / 16; ++i) CHECK(__shfl_xor_sync(half, lane, 8) == (lane ^ 8), "%d", lane);
    __syncwarp();
    // Threads that have returned are not waited for.
    if (lane >= 20) return;
    CHECK(__ballot_sync(ALL_LANES, 1) == 0xfffff, "%d", lane);
  });
}

void test_shared_variables() {
  run(3, WARP, 0, [] {
    __shared__ int values[WARP];
    CHECK(values[lane_index()] == -1, "shared memory of another block");
    __syncwarp();
    values[lane_index()] = lane_index();
  });
}

void test_blocks() {
  std::vector<int> sums(2 * 3 * 4);
  run(dim3(4, 3, 2), 8 * WARP, 8 * sizeof(int), [&] {
    // Some threads return before the others meet.
    if (warp_index() == 7) return;
    int* const scratch = dynamic_shared<int>();
    CHECK(scratch[7] == -1, "shared memory of another block");
    if (lane_index() == 0) scratch[warp_index()] = warp_index();
    __syncthreads();
    int sum = 0;
    for (int i = 0; i < 7; ++i) sum += scratch[i];
    CHECK(sum == 21, "%d", sum);
    if (threadIdx.x == 0) scratch[7] = 0;
    atomicAdd(&sums[(blockIdx.z * 3 + blockIdx.y) * 4 + blockIdx.x], 1);
  });
  for (const int sum : sums) CHECK(sum == 7 * WARP, "%d", sum);
  run(1, 4 * WARP, 4 * sizeof(float), [] {
    float* const scratch = dynamic_shared<float>();
    for (int i = 0; i < 3; ++i) {
      const float greatest = block_reduce(static_cast<float>(i * threadIdx.x), Greatest(), scratch);
      CHECK(greatest == i * 127.0f, "%g", greatest);
    }
  });
}

// In a run from either end, the second of three warps is neither the first nor the last to arrive. Only a shuffled
// order shows that nothing guarantees this. The same holds for blocks.
void test_orders() {
  const auto middle_is_second = [](dim3 grid, dim3 block) {
    int count = 0, place = -1;
    run(grid, block, 0, [&] {
      const unsigned number = blockIdx.x * warps_in_block() + warp_index();
      if (lane_index() > 0) return;
      if (number == 1) place = count;
      ++count;
    });
    return place == 1;
  };
  const auto shown_by = [&](dim3 grid, dim3 block) {
    int shown = 0;
    for (int seed = 0; seed < 30; ++seed) {
      setenv("DLVAE_EMULATED_ORDER", std::to_string(seed).c_str(), 1);
      const bool holds = middle_is_second(grid, block);
      CHECK(holds == middle_is_second(grid, block), "seed %d gives two orders", seed);
      shown += !holds;
    }
    unsetenv("DLVAE_EMULATED_ORDER");
    return shown;
  };
  int order[2][64] = {}, count = 0;
  for (auto& each : order) {
    count = 0;
    run(1, 64, 0, [&] { each[threadIdx.x] = count++; });
  }
  CHECK(order[0][5] == 63 - order[1][5], "%d, %d", order[0][5], order[1][5]);
  for (int i = 0; i < 2; ++i) CHECK(middle_is_second(1, 3 * WARP) && middle_is_second(3, WARP), "another order");
  // Two of three.
  const int of_warps = shown_by(1, 3 * WARP), of_blocks = shown_by(3, WARP);
  CHECK(of_warps > 10 && of_warps < 30, "%d", of_warps);
  CHECK(of_blocks > 10 && of_blocks < 30, "%d", of_blocks);
  // A barrier and operations of a warp work in any order.
  setenv("DLVAE_EMULATED_ORDER", "1", 1);
  test_lanes();
  test_blocks();
  test_products<__half>();
  unsetenv("DLVAE_EMULATED_ORDER");
}

void test_copies() {
  alignas(16) float from[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  run(1, WARP, WARP * 32, [&] {
    float* const to = dynamic_shared<float>() + 8 * lane_index();
    cp_async16(to, from, 16);
    cp_async_commit();
    cp_async16(to + 4, from + 4, 8);
    CHECK(std::isnan(to[0]) && std::isnan(to[7]), "%g, %g before the wait", to[0], to[7]);
    cp_async_commit();
    cp_async_wait<1>();
    CHECK(to[0] == 1 && to[3] == 4 && std::isnan(to[4]), "%g, %g, %g", to[0], to[3], to[4]);
    cp_async_wait<0>();
    CHECK(to[5] == 6 && to[6] == 0 && to[7] == 0, "%g, %g, %g", to[5], to[6], to[7]);
  });
}

void test_errors() {
  const std::string parted = error_of(64, [] {
    if (threadIdx.x < 40) {
      __syncthreads();
    } else {
      __shfl_sync(ALL_LANES, 0, 0);
    }
  });
  CHECK(holds(parted, "kernel test: no thread can go on"), "%s", parted.c_str());
  CHECK(holds(parted, "thread (0, 0, 0) of block (0, 0, 0) waits at __syncthreads"), "%s", parted.c_str());
  CHECK(holds(parted, "thread (40, 0, 0) of block (0, 0, 0) waits at __shfl_sync"), "%s", parted.c_str());
  const std::string differ = error_of(32, [] { lane_index() < 3 ? (void)__ballot_sync(ALL_LANES, 1) : __syncwarp(); });
  CHECK(holds(differ, "waits at __syncwarp"), "%s", differ.c_str());
  CHECK(holds(error_of(32, [] { __syncwarp(1); }), "not in the mask"), "a lane outside its mask");
  CHECK(holds(error_of(2000, [] {}), "2000 threads in a block"), "too many threads");
  const std::string odd = error_of(32, [] {
    uint32_t to[4];
    ldmatrix_x4(to, dynamic_shared<char>() + 2);
  });
  CHECK(holds(odd, "not a multiple of 16 bytes"), "%s", odd.c_str());
  // The next launch is unaffected.
  test_blocks();
}

#if defined(__x86_64__)
void test_float16() {
  Random random;
  for (uint32_t i = 0; i < 1u << 24; ++i) {
    // All half-precision numbers and their neighbours, midpoints of two of them, and random numbers.
    const uint32_t near = (i & 0xff) - 0x80 + (i >> 8 & 1 ? 0x1000 : 0);
    const float value = __uint_as_float(i < 1u << 23 ? (i >> 9 << 17) + near : random.bits());
    const _Float16 expected = static_cast<_Float16>(value);
    uint16_t bits;
    std::memcpy(&bits, &expected, 2);
    const __half half = __float2half_rn(value);
    if (std::isnan(value)) {
      CHECK(std::isnan(__half2float(half)), "%x", bits_of(half));
    } else {
      CHECK(bits_of(half) == bits, "%a gives %x", value, bits_of(half));
      CHECK(__half2float(half) == static_cast<float>(expected), "%x", bits);
    }
  }
}
#endif

void test_bfloat16() {
  Random random;
  for (int i = 0; i < 100000; ++i) {
    const float value = __uint_as_float(i % 2 ? random.bits() : random.bits() & 0xffff8000);
    const float rounded = to_float(__float2bfloat16_rn(value));
    if (std::isnan(value)) {
      CHECK(std::isnan(rounded), "%g", rounded);
      continue;
    }
    int exponent;
    std::frexp(value, &exponent);
    const double unit = std::ldexp(1.0, std::max(exponent, -125) - 8), expected = std::nearbyint(value / unit) * unit;
    CHECK(rounded == static_cast<float>(expected), "%a gives %a", value, rounded);
  }
}

template <class T>
void test_vectors() {
  alignas(16) T from[16], to[16];
  for (int i = 0; i < 16; ++i) from_float(1.5f * i, &from[i]);
  float values[16], one[1];
  load_floats(from, values);
  load_floats(from + 3, one);
  CHECK(values[11] == 16.5f && one[0] == 4.5f, "%g, %g", values[11], one[0]);
  store_floats(values, to);
  CHECK(std::memcmp(from, to, sizeof(to)) == 0, "other bits");
}

void test_row_offsets() {
  const Rows rows{nullptr, Type::float32, 24, 5, 1, 3, {2, 3, 4}, {1000, 100, 10}};
  for (int i = 0; i < 24; ++i) {
    CHECK(row_offset(rows, i) == i / 12 * 1000 + i / 4 % 3 * 100 + i % 4 * 10, "row %d", i);
  }
}

}  // namespace
}  // namespace dlvae

int main() {
  using namespace dlvae;
  test_products<__half>();
  test_products<__nv_bfloat16>();
  test_lanes();
#if !defined(__SANITIZE_ADDRESS__)
  test_shared_variables();
#endif
  test_blocks();
  test_orders();
  test_copies();
  test_errors();
#if defined(__x86_64__)
  test_float16();
#endif
  test_bfloat16();
  test_vectors<float>();
  test_vectors<__half>();
  test_vectors<__nv_bfloat16>();
  test_row_offsets();
  std::printf("emulator: ok\n");
}
