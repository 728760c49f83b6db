#include "search_cuda.h"

#include <cfloat>

#include "launch.h"
#include "parts.cuh"
#include "rows_cuda.cuh"
#include "tiles.cuh"

namespace dlvae {
namespace {

// The best scores of a row so far. A score is half the squared distance minus a term that all codes share.
struct Best {
  float score, runner_up;
  int code;
};

__device__ void add(Best& best, float score, int code) {
  best.runner_up = fminf(best.runner_up, fmaxf(best.score, score));
  if (score < best.score) best.score = score, best.code = code;
}

__device__ void join(Best& best, const Best& other) {
  best.runner_up = fminf(fminf(best.runner_up, other.runner_up), fmaxf(best.score, other.score));
  if (other.score < best.score) best.score = other.score, best.code = other.code;
}

// One block processes one tile of rows and one partition of the codes of head blockIdx.z.
template <class Tiles>
__global__ void __launch_bounds__(Tiles::THREADS, 1) search_kernel(
    Parts rows, Parts codes, const float* inverse, const float* half_norms, int tiles_of_share, Best* found) {
  char* const shared = dynamic_shared<char>();
  constexpr int GROUPS = Tiles::WARP_ROWS / 16;
  const int64_t row_tile = (int64_t)blockIdx.z * gridDim.x + blockIdx.x;
  const int tiles = (int)(codes.count / TILE / gridDim.z), tiles_before = blockIdx.z * tiles;
  const int first_tile = tiles_before + blockIdx.y * tiles_of_share;
  const int last_tile = min(first_tile + tiles_of_share, tiles_before + tiles);
  Best best[GROUPS][2];
  float factors[GROUPS][2];
#pragma unroll
  for (int i = 0; i < GROUPS; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      best[i][h] = {FLT_MAX, FLT_MAX, first_tile * TILE};
      factors[i][h] = -inverse[row_tile * TILE + Tiles::row_of(i, h)];
    }
  Tiles::run(rows, row_tile, codes, first_tile, last_tile, shared, [&](int tile, const typename Tiles::Sums& sums) {
#pragma unroll
    for (int j = 0; j < Tiles::WARP_CODES / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int code = tile * TILE + Tiles::code_of(j, e);
        const float half_norm = half_norms[code];
#pragma unroll
        for (int i = 0; i < GROUPS; ++i)
#pragma unroll
          for (int h = 0; h < 2; ++h) add(best[i][h], fmaf(factors[i][h], sums[i][j][2 * h + e], half_norm), code);
      }
  });
  // Merges the results of the 4 lanes, and of the warps for different codes, that hold a row.
  Best* const of_warps = reinterpret_cast<Best*>(shared);  // [WARPS_OF_CODES][TILE]
#pragma unroll
  for (int i = 0; i < GROUPS; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      Best& own = best[i][h];
#pragma unroll
      for (int step = 1; step < 4; step *= 2)
        join(
            own, {__shfl_xor_sync(ALL_LANES, own.score, step), __shfl_xor_sync(ALL_LANES, own.runner_up, step),
                  __shfl_xor_sync(ALL_LANES, own.code, step)});
      if (lane_index() % 4 == 0) of_warps[warp_index() % Tiles::WARPS_OF_CODES * TILE + Tiles::row_of(i, h)] = own;
    }
  __syncthreads();
  if (threadIdx.x >= TILE) return;
  Best own = of_warps[threadIdx.x];
  for (int w = 1; w < Tiles::WARPS_OF_CODES; ++w) join(own, of_warps[w * TILE + threadIdx.x]);
  own.code -= tiles_before * TILE;
  found[blockIdx.y * rows.count + row_tile * TILE + threadIdx.x] = own;
}

// Merges the partitions for rows [begin, end) of head blockIdx.y. Rows whose best code is not certain are appended to
// the list. Row i of head h is vector i * H + h.
__global__ void finish_kernel(
    const Best* found, int shares, int64_t padded, int64_t begin, int64_t end, const float* lengths,
    const float* extent, int64_t features, int64_t* indices, int* list, int* listed) {
  const int64_t in_head = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (begin + in_head >= end) return;
  const int64_t row = blockIdx.y * (padded / gridDim.y) + in_head, vector = (begin + in_head) * gridDim.y + blockIdx.y;
  Best best = found[row];
  for (int share = 1; share < shares; ++share) join(best, found[share * padded + row]);
  indices[vector] = best.code;
  const float longest = extent[2 * blockIdx.y + 1], product_bound = lengths[row] * longest;
  const float error = error_of_products<3>(features) * product_bound + ERROR_OF_START * longest * longest +
                      error_of_underflow(features);
  // A bound that is NaN or infinite makes the row uncertain.
  const bool is_certain = product_bound < 0x1p100f && best.score < 0x1p100f && best.runner_up - best.score > 2 * error;
  if (!is_certain) list[atomicAdd(listed, 1)] = (int)vector;
}

// A distance, infinite before the first code; ties go to the lower index. Codes with NaN are skipped, so that code 0
// remains if all hold NaN.
struct Exact {
  double distance;
  int code;
};
__device__ void take_nearer(Exact& nearest, const Exact& other) {
  const bool is_nearer =
      other.distance < nearest.distance || (other.distance == nearest.distance && other.code < nearest.code);
  if (is_nearer) nearest = other;
}

constexpr int RESCAN_THREADS = 256;
constexpr int LANES = 8;  // number of lanes that share a code

// Compares all codes of its head in float64 by differences for each vector on the list.
__global__ void __launch_bounds__(RESCAN_THREADS)
    rescan_kernel(Rows x, Rows codes, int heads, const int* list, const int* listed, int64_t* indices) {
  __shared__ Exact of_warps[RESCAN_THREADS / WARP];
  __shared__ int of_row[RESCAN_THREADS / WARP];
  for (int item = blockIdx.x; item < *listed; item += gridDim.x) {
    const int vector = list[item], head = vector % heads;
    const int64_t at = row_offset(x, head * (x.count / heads) + vector / heads);
    const int64_t num_codes = codes.count / heads, codes_before = head * num_codes;
    Exact nearest{(double)INFINITY, 0};
    bool is_nan_row = false;
    // Whole warps iterate together, since their lanes reduce together.
    for (int64_t first = 0; first < num_codes; first += RESCAN_THREADS / LANES) {
      const int64_t code = first + threadIdx.x / LANES;
      double sum = 0;
      bool is_nan_code = false;
      if (code < num_codes) {
        const int64_t code_at = row_offset(codes, codes_before + code);
        for (int64_t d = threadIdx.x % LANES; d < x.features; d += LANES) {
          const float a = load_element(x, at + d * x.stride), c = load_element(codes, code_at + d * codes.stride);
          is_nan_row |= a != a;
          is_nan_code |= c != c;
          sum += ((double)a - c) * ((double)a - c);
        }
      }
      for (int step = 1; step < LANES; step *= 2) {
        sum += __shfl_xor_sync(ALL_LANES, sum, step);
        is_nan_code |= __shfl_xor_sync(ALL_LANES, (int)is_nan_code, step) != 0;
      }
      if (code >= num_codes || is_nan_code) continue;
      take_nearer(nearest, {sum - sum == 0 ? sum : DBL_MAX, (int)code});
    }
    for (int step = LANES; step < 32; step *= 2)
      take_nearer(
          nearest,
          {__shfl_xor_sync(ALL_LANES, nearest.distance, step), __shfl_xor_sync(ALL_LANES, nearest.code, step)});
    if (lane_index() == 0) of_warps[warp_index()] = nearest;
    // A row that holds NaN is assigned to code 0.
    const bool is_nan = block_reduce((int)is_nan_row, Greatest{}, of_row) != 0;
    if (threadIdx.x == 0) {
      for (int w = 1; w < RESCAN_THREADS / 32; ++w) take_nearer(nearest, of_warps[w]);
      indices[vector] = is_nan ? 0 : nearest.code;
    }
    __syncthreads();
  }
}

}  // namespace

Tensor search(
    const Tensor& like, const Rows& x, const Rows& codes, int64_t* indices, const Device& device, int64_t heads) {
  STD_TORCH_CHECK(x.count < INT32_MAX, "expected x of at most ", INT32_MAX - 1, " vectors, got ", x.count);
  const PackedCodes packed = pack_codes(like, codes, arithmetic_of(x, codes), device, heads);
  const Tensor list = new_tensor(like, {x.count}, ScalarType::Int), listed = new_zeroed(like, {1}, ScalarType::Int);
  const int code_tiles = (int)(packed.parts.count / TILE / heads);
  const unsigned grid_heads = (unsigned)heads;
  const int64_t of_head = x.count / heads, chunk = rows_of_chunk(packed.parts.depth * heads, device);
  for (int64_t begin = 0; begin < of_head; begin += chunk) {
    const int64_t end = std::min(begin + chunk, of_head);
    const PackedRows rows = pack_rows(like, x, begin, end, packed, device);
    const int row_tiles = (int)(rows.parts.count / TILE / heads);
    // A few tiles of rows alone would not fill the device, so the codes are partitioned too.
    const int wanted = std::clamp(device.multiprocessors / (row_tiles * (int)heads), 1, code_tiles);
    const int tiles_of_share = (int)ceil_div(code_tiles, wanted), shares = (int)ceil_div(code_tiles, tiles_of_share);
    const Tensor found = new_tensor(like, {shares, rows.parts.count, sizeof(Best) / sizeof(float)});
    Best* const best = data_of<Best>(found);
    with_tiles<1>(packed.arithmetic, packed.parts.depth, [&](auto tiles) {
      using Kind = decltype(tiles);
      launch(
          "search", search_kernel<Kind>, dim3(row_tiles, shares, grid_heads), Kind::THREADS,
          Kind::shared_bytes(Kind::row_slots(packed.parts.depth / Kind::DEPTH)), device.stream, rows.parts,
          packed.parts, rows.inverse, packed.half_norms, tiles_of_share, best);
    });
    launch(
        "finish", finish_kernel, dim3(blocks(ceil_div(end - begin, 256)), grid_heads), 256, 0, device.stream, best,
        shares, rows.parts.count, begin, end, rows.lengths, packed.extent, x.features, indices, data_of<int>(list),
        data_of<int>(listed));
  }
  launch(
      "rescan", rescan_kernel, blocks(std::min<int64_t>(x.count, 4 * device.multiprocessors)), RESCAN_THREADS, 0,
      device.stream, x, codes, (int)heads, data_of<int>(list), data_of<int>(listed), indices);
  return listed;
}

}  // namespace dlvae
