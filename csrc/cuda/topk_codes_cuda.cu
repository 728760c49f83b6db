// The k best codes of each row. Scores are computed for a chunk of rows at a time. For each row, the codes that may be
// among the k best are compared exactly and sorted.
#include <cfloat>

#include "../operations.h"
#include "launch.h"
#include "parts.cuh"
#include "products.h"
#include "rows_cuda.cuh"

namespace dlvae {
namespace {

constexpr int THREADS = 128;
constexpr int MOST = 2048;  // codes of a row that are compared exactly, at most
constexpr int64_t MOST_K = 1024;

struct Topk {
  Rows x, codes, bias;  // bias without data: none
  int64_t k;
  bool is_product;
  int64_t* indices;
  float* values;
};

// The order of codes: lower is better, then by index. NaN codes come last, after scores that are not finite.
struct Exact {
  double score;
  int code;
};
__device__ bool comes_before(const Exact& a, const Exact& b) {
  return a.score < b.score || (a.score == b.score && a.code < b.code);
}

constexpr int LANES = 8;  // number of lanes that share a code

// Returns the squared distance, or the negated product, without replacing special values; equal codes get equal
// results. All lanes of a warp call this together.
__device__ double exact_score(const Topk& t, int64_t row_at, int64_t code) {
  const int64_t code_at = row_offset(t.codes, code);
  double sum = 0;
  for (int64_t d = threadIdx.x % LANES; d < t.x.features; d += LANES) {
    const double a = load_element(t.x, row_at + d * t.x.stride);
    const double c = load_element(t.codes, code_at + d * t.codes.stride);
    sum += t.is_product ? a * c : (a - c) * (a - c);
  }
  for (int step = 1; step < LANES; step *= 2) sum += __shfl_xor_sync(ALL_LANES, sum, step);
  if (!t.is_product) return sum;
  return -(t.bias.data == nullptr ? sum : sum + load_element(t.bias, code * t.bias.stride));
}

__device__ bool is_nan_code(const Topk& t, int64_t code) {
  const int64_t code_at = row_offset(t.codes, code);
  int is_nan = 0;
  for (int64_t d = threadIdx.x % LANES; d < t.x.features; d += LANES) {
    const float c = load_element(t.codes, code_at + d * t.codes.stride);
    is_nan |= c != c;
  }
  for (int step = 1; step < LANES; step *= 2) is_nan |= __shfl_xor_sync(ALL_LANES, is_nan, step);
  if (t.bias.data == nullptr) return is_nan;
  const float bias = load_element(t.bias, code * t.bias.stride);
  return is_nan || bias != bias;
}

// Converts floats to unsigned integers in the same order.
__device__ uint32_t ordered(float value) {
  const uint32_t bits = __float_as_uint(value);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ float from_ordered(uint32_t bits) { return __uint_as_float(bits >> 31 ? bits & 0x7fffffffu : ~bits); }
__device__ uint64_t ordered(double value) {
  const uint64_t bits = __double_as_longlong(value);
  return bits >> 63 ? ~bits : bits | 1ull << 63;
}

constexpr int DIGIT = 8, BINS = 1 << DIGIT;

// Returns the k-th lowest of `count` keys key(i), by radix selection with all threads of the block. The block is
// synchronised before the first key is read and after the last.
template <class Key, class F>
__device__ Key kth_lowest(int64_t count, int64_t k, const F& key) {
  __shared__ int bins[BINS];
  __shared__ int chosen;
  __shared__ int64_t left;
  Key prefix = 0;
  for (int shift = sizeof(Key) * 8 - DIGIT; shift >= 0; shift -= DIGIT) {
    for (int i = threadIdx.x; i < BINS; i += blockDim.x) bins[i] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
      const Key own = key(i);
      // Two shifts, because a shift by all bits of an integer is undefined.
      if ((own ^ prefix) >> shift >> DIGIT == 0) atomicAdd(bins + (int)(own >> shift & (BINS - 1)), 1);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int bin = 0;
      int64_t before = 0;
      while (before + bins[bin] < k) before += bins[bin++];
      chosen = bin;
      left = k - before;
    }
    __syncthreads();
    prefix |= (Key)chosen << shift;
    k = left;
  }
  return prefix;
}

// Sorts `count` elements in shared memory, which has room for the next power of two.
__device__ void sort_exact(Exact* all, int count) {
  int padded = 1;
  while (padded < count) padded *= 2;
  for (int i = count + threadIdx.x; i < padded; i += blockDim.x) all[i] = {(double)INFINITY, INT32_MAX};
  for (int length = 2; length <= padded; length *= 2) {
    for (int step = length / 2; step > 0; step /= 2) {
      __syncthreads();
      for (int i = threadIdx.x; i < padded; i += blockDim.x) {
        const int other = i ^ step;
        if (other < i || comes_before(all[i], all[other]) == ((i & length) == 0)) continue;
        const Exact swap = all[i];
        all[i] = all[other], all[other] = swap;
      }
    }
  }
  __syncthreads();
}

__device__ void put(const Topk& t, int64_t row, int64_t row_at, const Exact* sorted) {
  for (int64_t first = 0; first < t.k; first += THREADS / LANES) {
    const int64_t i = first + threadIdx.x / LANES;
    const Exact own = sorted[min(i, t.k - 1)];
    // The order may hold a replacement for this score.
    const double score = exact_score(t, row_at, own.code);
    if (i >= t.k || threadIdx.x % LANES != 0) continue;
    t.indices[row * t.k + i] = own.code;
    t.values[row * t.k + i] = (float)(t.is_product ? -score : score);
  }
}

// [2]: the error bound of a score is the first element times |x|, in the scale of packed rows, plus the second.
__global__ void margins_kernel(Topk t, const float* extent, const float* largest_bias, bool is_split, double* margins) {
  const double longest = extent[1], relative_error = error_of_products<4>(t.x.features);
  // The square might overflow float32.
  const double unit = t.is_product ? unit_of(extent, is_split) : 1;
  // The half norm of a very long code overflows. Such a code is never the nearest, but may have any product.
  const bool is_known = !t.is_product || longest < 0x1p60f;
  margins[0] = is_known ? relative_error * longest * unit * unit : INFINITY;
  margins[1] = ERROR_OF_START * (t.is_product ? *largest_bias : longest * longest) + error_of_underflow(t.x.features);
}

// The start, from which each product is subtracted, is minus the bias, or FAR for codes that are never among the best.
// The largest bias is infinite if sums with a bias might overflow.
__global__ void starts_kernel(Topk t, const float* half_norms, int64_t padded, float* starts, float* largest_bias) {
  const int64_t code = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (code >= padded) return;
  float bias = t.bias.data == nullptr || code >= t.codes.count ? 0 : load_element(t.bias, code * t.bias.stride);
  const bool is_far = !(half_norms[code] < FAR && fabsf(bias) < 0x1p100f);
  starts[code] = is_far ? FAR : -bias;
  if (fabsf(bias) < INFINITY) raise(largest_bias, fabsf(bias) < 0x1p100f ? fabsf(bias) : INFINITY);
}

// One block processes one row: it compares the codes whose score may be among the k best exactly. Rows with more than
// `room` such codes are appended to the list.
__global__ void __launch_bounds__(THREADS, 4) select_kernel(
    Topk t, int64_t begin, const float* scores, const float* lengths, const double* margins, int room, int* list,
    int* listed) {
  Exact* const found = dynamic_shared<Exact>();
  __shared__ int count;
  const int64_t row = begin + blockIdx.x, row_at = row_offset(t.x, row);
  const float* const own = scores + (int64_t)blockIdx.x * t.codes.count;
  if (threadIdx.x == 0) count = 0;
  const float kth = from_ordered(kth_lowest<uint32_t>(t.codes.count, t.k, [&](int64_t i) { return ordered(own[i]); }));
  const double error = margins[0] * lengths[blockIdx.x] + margins[1];
  const float limit = (float)(kth + 2 * error);
  // An error bound or score that is NaN or infinite makes the row uncertain.
  if (error < 0x1p80 && fabsf(kth) < 0x1p100f) {
    for (int64_t code = threadIdx.x; code < t.codes.count; code += THREADS) {
      if (own[code] > limit) continue;
      const int place = atomicAdd(&count, 1);
      if (place < room) found[place].code = (int)code;
    }
  } else if (threadIdx.x == 0) {
    count = room + 1;
  }
  __syncthreads();
  if (count > room) {
    if (threadIdx.x == 0) list[atomicAdd(listed, 1)] = (int)row;
    return;
  }
  for (int i = threadIdx.x / LANES; i < (count + 31) / 32 * 32; i += THREADS / LANES) {
    const double score = exact_score(t, row_at, found[min(i, count - 1)].code);
    if (i < count && threadIdx.x % LANES == 0) found[i].score = score;
  }
  sort_exact(found, count);
  put(t, row, row_at, found);
}

// One block compares all codes for one row on the list at a time, and keeps its scores in `scores` [blocks, K].
__global__ void __launch_bounds__(THREADS, 4)
    rescan_kernel(Topk t, const int* list, const int* listed, double* scores) {
  Exact* const found = dynamic_shared<Exact>();
  __shared__ int count, of_warps[THREADS / WARP];
  double* const own = scores + (int64_t)blockIdx.x * t.codes.count;
  for (int item = blockIdx.x; item < *listed; item += gridDim.x) {
    const int64_t row = list[item], row_at = row_offset(t.x, row);
    bool holds_nan = false;
    for (int64_t d = threadIdx.x; d < t.x.features; d += THREADS) {
      const float value = load_element(t.x, row_at + d * t.x.stride);
      holds_nan |= value != value;
    }
    // The scores of a row that holds NaN count as equal: its codes go by index.
    const bool is_nan_row = block_reduce((int)holds_nan, Greatest{}, of_warps) != 0;
    for (int64_t first = 0; first < t.codes.count; first += THREADS / LANES) {
      const int64_t code = first + threadIdx.x / LANES, known = min(code, t.codes.count - 1);
      const double score = exact_score(t, row_at, known);
      const bool is_last = is_nan_code(t, known);
      if (code >= t.codes.count || threadIdx.x % LANES != 0) continue;
      own[code] = is_nan_row ? 0 : is_last ? (double)INFINITY : fabs(score) <= DBL_MAX ? score : DBL_MAX;
    }
    if (threadIdx.x == 0) count = 0;
    const uint64_t kth = kth_lowest<uint64_t>(t.codes.count, t.k, [&](int64_t i) { return ordered(own[i]); });
    for (int64_t code = threadIdx.x; code < t.codes.count; code += THREADS)
      if (ordered(own[code]) < kth) found[atomicAdd(&count, 1)] = {own[code], (int)code};
    __syncthreads();
    // One warp selects the lowest of the codes that tie for the last places.
    int taken = count;
    for (int64_t first = 0; warp_index() == 0 && taken < t.k && first < t.codes.count; first += 32) {
      const bool ties = first + lane_index() < t.codes.count && ordered(own[first + lane_index()]) == kth;
      const uint32_t all = __ballot_sync(ALL_LANES, ties);
      const int place = taken + __popc(all & ((1u << lane_index()) - 1));
      if (ties && place < t.k) found[place] = {own[first + lane_index()], (int)(first + lane_index())};
      taken += __popc(all);
    }
    sort_exact(found, (int)t.k);
    put(t, row, row_at, found);
  }
}

int power_of_two_from(int64_t count) {
  int power = 1;
  while (power < count) power *= 2;
  return power;
}

}  // namespace

std::tuple<Tensor, Tensor> topk_codes(
    const Tensor& x, const Tensor& dictionary, int64_t k, std::string metric, std::optional<Tensor> bias) {
  STD_TORCH_CHECK(metric == "l2" || metric == "dot", "expected metric to be 'l2' or 'dot', got '", metric, "'");
  const Device device(x);
  Topk t{};
  t.x = rows_of("x", x);
  t.codes = codes_of("dictionary", dictionary, t.x);
  STD_TORCH_CHECK(
      k >= 1 && k <= t.codes.count && k <= MOST_K, "expected k in [1, K] = [1, ", t.codes.count, "] and at most ",
      MOST_K, ", got ", k);
  STD_TORCH_CHECK(t.x.count < INT32_MAX, "expected x of at most ", INT32_MAX - 1, " vectors, got ", t.x.count);
  t.k = k;
  t.is_product = metric == "dot";
  if (bias.has_value()) {
    STD_TORCH_CHECK(t.is_product, "expected bias to be None with metric 'l2', got a tensor");
    t.bias = rows_of("bias", *bias);
    STD_TORCH_CHECK(
        t.bias.features == t.codes.count && t.bias.count == 1, "expected bias of shape [K] = [", t.codes.count,
        "], got ", shape_text(*bias));
  }
  const Tensor indices = new_tensor(x, shape_with(x, {k}), ScalarType::Long);
  const Tensor values = new_tensor(x, shape_with(x, {k}));
  t.indices = data_of<int64_t>(indices);
  t.values = data_of<float>(values);
  if (t.x.count == 0) return {indices, values};

  const PackedCodes packed = pack_codes(x, t.codes, arithmetic_of(t.x, t.codes), device);
  const int64_t padded = packed.parts.count;
  const Tensor start = new_tensor(x, {t.is_product ? padded : 0}), bound = new_zeroed(x, {1});
  const Tensor margin = new_tensor(x, {2}, ScalarType::Double);
  float *const starts = data_of<float>(start), *const largest_bias = data_of<float>(bound);
  double* const margins = data_of<double>(margin);
  if (t.is_product)
    launch(
        "starts", starts_kernel, blocks(padded / TILE), TILE, 0, device.stream, t, packed.half_norms, padded, starts,
        largest_bias);
  const bool is_split = packed.arithmetic == Arithmetic::split;
  launch("margins", margins_kernel, 1, 1, 0, device.stream, t, packed.extent, largest_bias, is_split, margins);

  const Tensor list = new_tensor(x, {t.x.count}, ScalarType::Int), listed = new_zeroed(x, {1}, ScalarType::Int);
  const int room = std::min(MOST, power_of_two_from(k + k / 4 + 32));
  const int64_t shared = room * sizeof(Exact);
  const int64_t chunk = rows_of_chunk(std::max<int64_t>(packed.parts.depth, 2 * t.codes.count), device);
  const Tensor scores = new_tensor(x, {std::min(chunk, t.x.count), t.codes.count});
  float* const score = data_of<float>(scores);
  const Affine affine{t.is_product ? starts : packed.half_norms, -1, !t.is_product, false};
  for (int64_t begin = 0; begin < t.x.count; begin += chunk) {
    const int64_t end = std::min(begin + chunk, t.x.count);
    const PackedRows rows = products(x, t.x, begin, end, packed, affine, score, t.codes.count, device);
    launch(
        "select", select_kernel, blocks(end - begin), THREADS, shared, device.stream, t, begin, score, rows.lengths,
        margins, room, data_of<int>(list), data_of<int>(listed));
  }
  const int64_t most = std::min<int64_t>(t.x.count, device.multiprocessors);
  const int64_t many = std::clamp<int64_t>((1 << 22) / t.codes.count, 1, most);
  const Tensor exact = new_tensor(x, {many, t.codes.count}, ScalarType::Double);
  launch(
      "rescan", rescan_kernel, blocks(many), THREADS, shared, device.stream, t, data_of<int>(list),
      data_of<int>(listed), data_of<double>(exact));
  return {indices, values};
}

}  // namespace dlvae
