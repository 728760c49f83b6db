#include "segment_sum_cuda.h"

#include "launch.h"
#include "rows_cuda.cuh"
#include "sort.h"

namespace dlvae {
namespace {

constexpr int THREADS = 256;
constexpr int CHUNK = 128;  // number of pairs that one warp sums
constexpr int COLUMNS = 4;  // number of features per lane, 32 apart
constexpr int AT_ONCE = 4;  // number of rows that are loaded concurrently
constexpr int64_t FEATURES = 32 * COLUMNS;

__global__ void keys_kernel(Pairs pairs, uint32_t* keys) {
  const int64_t p = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (p >= pairs.count) return;
  const int64_t code = pairs.codes[p];
  const bool is_left_out = pairs.left_out != nullptr && pairs.left_out[p / pairs.per_row];
  const int64_t of_head = pairs.num_codes / pairs.heads;
  const bool is_in = code >= 0 && code < of_head && !is_left_out;
  keys[p] = (uint32_t)(is_in ? flat_code(p / pairs.per_row, code, pairs.heads, of_head) : pairs.num_codes);
}

// Finds the first pair of each code, and the end of the last code.
__global__ void starts_kernel(const uint32_t* keys, int64_t count, int64_t num_codes, int64_t* starts) {
  const int64_t code = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (code > num_codes) return;
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (keys[middle] < code) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  starts[code] = low;
}

__global__ void counts_kernel(const int64_t* starts, int64_t num_codes, float* counts, int64_t ld) {
  const int64_t code = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (code < num_codes) counts[code * ld] = (float)(starts[code + 1] - starts[code]);
}

struct Sums {
  float* data;
  int64_t ld;
  // [chunks][2][D]: the partial sum of a chunk for the code of its first pair, if that code began in an earlier chunk,
  // and for the code of its last pair, if that code continues.
  float* edges;
};

// One warp processes one chunk of sorted pairs and FEATURES features. T: the type of the rows.
template <class T>
__global__ void __launch_bounds__(THREADS, 2) sum_chunks_kernel(
    Rows rows, Pairs pairs, const uint32_t* keys, const uint32_t* order, const int64_t* starts, const float* scale,
    Sums sums) {
  const int64_t chunk = (int64_t)blockIdx.x * (THREADS / 32) + warp_index();
  const int64_t begin = chunk * CHUNK, end = min(begin + CHUNK, starts[pairs.num_codes]);
  const int64_t first = blockIdx.y * FEATURES + lane_index();
  const float factor = scale == nullptr ? 1 : *scale;
  const T* const data = static_cast<const T*>(rows.data);
  float sum[COLUMNS] = {};
  uint32_t code = begin < end ? keys[begin] : 0;
  const auto flush = [&](bool goes_on) {
    const bool began_before = starts[code] < begin;
    float* const to = began_before || goes_on ? sums.edges + (2 * chunk + (began_before ? 0 : 1)) * rows.features
                                              : sums.data + code * sums.ld;
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) {
      if (first + 32 * i < rows.features) to[first + 32 * i] = sum[i] * factor;
      sum[i] = 0;
    }
  };
  for (int64_t p = begin; p < end; p += 32) {
    // Each lane loads one pair, and all lanes iterate over all of these pairs.
    const bool is_there = p + lane_index() < end;
    const uint32_t place = is_there ? order[p + lane_index()] : 0, own_code = is_there ? keys[p + lane_index()] : 0;
    const int64_t own_offset = is_there ? row_offset(rows, place / pairs.per_row) : 0;
    const float own_weight = is_there && pairs.weights != nullptr ? pairs.weights[place] : 1;
    for (int q = 0; q < 32 && p + q < end; q += AT_ONCE) {
      float values[AT_ONCE][COLUMNS];
#pragma unroll
      for (int t = 0; t < AT_ONCE; ++t) {
        const int64_t offset = __shfl_sync(ALL_LANES, own_offset, q + t);
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) {
          const int64_t feature = first + 32 * i;
          values[t][i] =
              p + q + t < end && feature < rows.features ? to_float(data[offset + feature * rows.stride]) : 0;
        }
      }
#pragma unroll
      for (int t = 0; t < AT_ONCE; ++t) {
        const uint32_t next = __shfl_sync(ALL_LANES, own_code, q + t);
        const float weight = __shfl_sync(ALL_LANES, own_weight, q + t);
        if (p + q + t >= end) continue;
        if (next != code) {
          flush(false);
          code = next;
        }
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) sum[i] += weight * values[t][i];
      }
    }
  }
  if (begin < end) flush(starts[code + 1] > end);
}

// Adds the partial sums of codes that lie in several chunks, in order, in float64, because the error of a chain of
// additions grows with its length. Writes zeros for codes without pairs.
__global__ void join_chunks_kernel(const int64_t* starts, int64_t features, Sums sums) {
  const int64_t code = blockIdx.x;
  const int64_t begin = starts[code], end = starts[code + 1];
  const int64_t first = begin / CHUNK, last = (end - 1) / CHUNK;
  if (begin < end && first == last) return;
  for (int64_t d = threadIdx.x; d < features; d += blockDim.x) {
    double sum = 0;
    for (int64_t chunk = first; begin < end && chunk <= last; ++chunk)
      sum += sums.edges[(2 * chunk + (begin < chunk * CHUNK ? 0 : 1)) * features + d];
    sums.data[code * sums.ld + d] = (float)sum;
  }
}

int bits_of(int64_t keys) {
  int bits = 1;
  while (bits < 32 && (int64_t)1 << bits < keys) ++bits;
  return bits;
}

unsigned blocks_of(int64_t count) { return blocks(ceil_div(count, THREADS)); }

}  // namespace

SortedPairs::SortedPairs(const Tensor& like, const Pairs& pairs, const Device& device)
    : pairs_(pairs),
      keys_(new_tensor(like, {2, pairs.count}, ScalarType::Int)),
      order_(new_tensor(like, {pairs.count}, ScalarType::Int)),
      starts_(new_tensor(like, {pairs.num_codes + 1}, ScalarType::Long)) {
  STD_TORCH_CHECK(
      pairs.count < INT32_MAX, "expected indices of at most ", INT32_MAX - 1, " elements, got ", pairs.count);
  uint32_t* const keys = data_of<uint32_t>(keys_);
  if (pairs.count > 0) {
    launch("keys", keys_kernel, blocks_of(pairs.count), THREADS, 0, device.stream, pairs, keys + pairs.count);
    sort_places(
        like, keys + pairs.count, pairs.count, bits_of(pairs.num_codes + 1), keys, data_of<uint32_t>(order_), device);
  }
  launch(
      "starts", starts_kernel, blocks_of(pairs.num_codes + 1), THREADS, 0, device.stream, keys, pairs.count,
      pairs.num_codes, data_of<int64_t>(starts_));
}

void SortedPairs::sum(
    const Tensor& like, const Rows& rows, const float* scale, float* sums, int64_t ld, const Device& device) const {
  if (rows.features == 0) return;
  const int64_t chunks = ceil_div(pairs_.count, CHUNK);
  const Tensor edges = new_tensor(like, {chunks, 2, rows.features});
  const Sums to{sums, ld, data_of<float>(edges)};
  const int64_t* const starts = data_of<int64_t>(starts_);
  const dim3 grid(blocks(ceil_div(chunks, THREADS / WARP)), blocks(ceil_div(rows.features, FEATURES)));
  with_type(rows.type, [&](auto zero) {
    launch(
        "sum_chunks", sum_chunks_kernel<decltype(zero)>, grid, THREADS, 0, device.stream, rows, pairs_,
        data_of<uint32_t>(keys_), data_of<uint32_t>(order_), starts, scale, to);
  });
  launch("join_chunks", join_chunks_kernel, blocks(pairs_.num_codes), 128, 0, device.stream, starts, rows.features, to);
}

void SortedPairs::count(float* counts, int64_t ld, const Device& device) const {
  launch(
      "counts", counts_kernel, blocks_of(pairs_.num_codes), THREADS, 0, device.stream, data_of<int64_t>(starts_),
      pairs_.num_codes, counts, ld);
}

}  // namespace dlvae
