#include "parts.h"

#include "launch.h"
#include "parts.cuh"
#include "rows_cuda.cuh"

namespace dlvae {
namespace {

constexpr int STEP = 32;  // number of features

// Finds the largest finite element of the codes of head blockIdx.y.
__global__ void __launch_bounds__(RowBlock::THREADS) largest_element_kernel(Rows codes, float* extent) {
  __shared__ int64_t offsets[RowBlock::ROWS];
  const int64_t of_head = codes.count / gridDim.y, before = blockIdx.y * of_head;
  const RowBlock block(codes, before + (int64_t)blockIdx.x * RowBlock::ROWS, before + of_head, offsets);
  __syncthreads();
  float most = 0;
  for (int64_t feature = 0; feature < codes.features; feature += RowBlock::FEATURES) {
    block.for_each(feature, [&](int row, int i) {
      const float size = fabsf(load_element(codes, offsets[row] + (feature + i) * codes.stride));
      if (size < INFINITY) most = fmaxf(most, size);
    });
  }
  most = warp_reduce(most, Greatest{});
  if (lane_index() == 0) raise(extent + 2 * blockIdx.y, most);
}

// Packs rows [begin, end) of head blockIdx.y including padding. If IS_CODES, the scale is that of the codebook and the
// half norms go to `numbers`; otherwise each row has a scale of its own, and `inverse` followed by `lengths` goes to
// `numbers`.
template <class Half, int PARTS, bool IS_CODES>
__global__ void __launch_bounds__(RowBlock::THREADS, 2) pack_kernel(
    Rows rows, int64_t begin, int64_t end, Half* parts, int64_t count, int depth, float* numbers, float* extent) {
  __shared__ int64_t offsets[RowBlock::ROWS];
  __shared__ RowBlock::Tile tile;
  const int64_t in_head = (int64_t)blockIdx.x * RowBlock::ROWS, before = blockIdx.y * (rows.count / gridDim.y);
  const int64_t first = blockIdx.y * (count / gridDim.y) + in_head;
  const RowBlock block(rows, before + begin + in_head, before + end, offsets);
  extent += 2 * blockIdx.y;
  constexpr int OWN = RowBlock::ROWS_OF_WARP;
  // The largest magnitudes of rows warp_index() * OWN + i, over features lane_index(), lane_index() + 32, ...
  float largest[OWN] = {};
  double squares[OWN] = {};
  const int common = PARTS == 1 ? 0 : exponent_for(extent[0]);
  const double unit = ldexp(1.0, common);
  const auto for_tiles = [&](const auto& f) {
    for (int64_t feature = 0; feature < rows.features; feature += RowBlock::FEATURES) {
      __syncthreads();
      block.load(feature, tile);
      __syncthreads();
#pragma unroll
      for (int i = 0; i < OWN; ++i) {
        const int row = warp_index() * OWN + i;
        const int64_t own = feature + lane_index();
        if (row < block.count && own < rows.features) f(i, own, tile[row][lane_index()]);
      }
    }
  };
  for_tiles([&](int i, int64_t, float value) {
    // NaN becomes infinity, which a maximum keeps.
    largest[i] = fmaxf(largest[i], value - value == 0 ? fabsf(value) : INFINITY);
    const double scaled = value * unit;
    squares[i] += scaled * scaled;
  });
  int exponents[OWN];
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    largest[i] = warp_reduce(largest[i], Greatest{});
    squares[i] = warp_reduce(squares[i], Sum{});
    const bool is_finite = largest[i] < INFINITY;
    exponents[i] = IS_CODES || PARTS == 1 ? common : exponent_for(is_finite ? largest[i] : 0);
    const int64_t to = first + warp_index() * OWN + i;
    const bool is_there = warp_index() * OWN + i < block.count, is_first = lane_index() == 0;
    const float length = (float)(sqrt(squares[i]) * (1 + 1e-6));
    bool is_held;
    if (IS_CODES) {
      is_held = is_finite && squares[i] / 2 < FAR;
      if (is_first) numbers[to] = is_there && is_held ? (float)(squares[i] / 2) : FAR;
      // The rounding error of small elements is proportional to the largest element, which may belong to a code that is
      // not finite.
      if (is_first && is_there && is_finite) raise(extent + 1, PARTS == 1 ? length : fmaxf(length, ldexpf(1, TOP)));
    } else {
      const float inverse = ldexpf(1.0f, common - exponents[i]);
      // The row is too long or too short for the scale of these codes.
      is_held = is_finite && inverse < INFINITY && inverse >= 0x1p-126f && length < LONG;
      if (is_first) numbers[to] = is_held ? inverse : 0;
      if (is_first) numbers[count + to] = is_held || !is_there ? length : INFINITY;
    }
    // Rows and codes that the terms cannot hold get terms of zero.
    if (!is_held) largest[i] = INFINITY;
  }
  const auto write = [&](int i, int64_t feature, float value) {
    Half* const to = parts + (first + warp_index() * OWN + i) * depth + feature;
    const float scaled = PARTS == 1 ? value : ldexpf(value, exponents[i]);
    from_float(largest[i] < INFINITY ? scaled : 0, to);
    if (PARTS == 2) from_float(largest[i] < INFINITY ? scaled - to_float(*to) : 0, to + count * depth);
  };
  for_tiles(write);
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    const bool is_there = warp_index() * OWN + i < block.count;
    const int64_t written = is_there ? rows.features : 0;
    for (int64_t feature = written + lane_index(); feature < depth; feature += WARP) write(i, feature, 0);
  }
}

int64_t in_tiles(int64_t count) { return ceil_div(count, TILE) * TILE; }
// Returns the padded number of features: 16, or a multiple of 32.
int depth_of(int64_t features) { return features <= 16 ? 16 : (int)(ceil_div(features, STEP) * STEP); }

template <bool IS_CODES>
void pack(
    Arithmetic arithmetic, int64_t heads, const Rows& rows, int64_t begin, int64_t end, void* parts, int64_t count,
    int depth, float* numbers, float* extent, const Device& device) {
  const auto run = [&](auto half, auto n) {
    using Half = decltype(half);
    launch(
        "pack", pack_kernel<Half, decltype(n)::value, IS_CODES>,
        dim3(blocks(count / heads / RowBlock::ROWS), (unsigned)heads), RowBlock::THREADS, 0, device.stream, rows, begin,
        end, static_cast<Half*>(parts), count, depth, numbers, extent);
  };
  switch (arithmetic) {
    case Arithmetic::split: return run(__half{}, std::integral_constant<int, 2>{});
    case Arithmetic::float16: return run(__half{}, std::integral_constant<int, 1>{});
    case Arithmetic::bfloat16: return run(__nv_bfloat16{}, std::integral_constant<int, 1>{});
  }
}

int parts_of(Arithmetic arithmetic) { return arithmetic == Arithmetic::split ? 2 : 1; }

}  // namespace

Arithmetic arithmetic_of(const Rows& x, const Rows& codes) {
  if (x.type != codes.type || x.type == Type::float32) return Arithmetic::split;
  return x.type == Type::float16 ? Arithmetic::float16 : Arithmetic::bfloat16;
}

int64_t rows_of_chunk(int64_t elements, const Device& device) {
  return std::max<int64_t>(TILE, device.chunk_elements / std::max<int64_t>(1, elements) / TILE * TILE);
}

PackedCodes pack_codes(
    const Tensor& like, const Rows& codes, Arithmetic arithmetic, const Device& device, int64_t heads) {
  const int64_t of_head = codes.count / heads, count = heads * in_tiles(of_head);
  const int depth = depth_of(codes.features);
  const int parts = parts_of(arithmetic);
  PackedCodes packed{
      arithmetic,
      heads,
      codes.count,
      {nullptr, count, depth},
      nullptr,
      nullptr,
      new_tensor(like, {parts, count, depth}, ScalarType::Half),
      new_tensor(like, {count}),
      new_zeroed(like, {heads, 2})};
  packed.parts.data = packed.parts_data.data_ptr();
  packed.half_norms = data_of<float>(packed.numbers);
  packed.extent = data_of<float>(packed.extent_data);
  if (arithmetic == Arithmetic::split) {
    launch(
        "largest_element", largest_element_kernel, dim3(RowBlock::blocks_of(of_head), (unsigned)heads),
        RowBlock::THREADS, 0, device.stream, codes, packed.extent);
  }
  pack<true>(
      arithmetic, heads, codes, 0, of_head, packed.parts_data.data_ptr(), count, depth, packed.half_norms,
      packed.extent, device);
  return packed;
}

PackedRows pack_rows(
    const Tensor& like, const Rows& x, int64_t begin, int64_t end, const PackedCodes& codes, const Device& device) {
  const int64_t count = codes.heads * in_tiles(end - begin);
  const int depth = codes.parts.depth;
  const int parts = parts_of(codes.arithmetic);
  PackedRows packed{
      {nullptr, count, depth},
      nullptr,
      nullptr,
      new_tensor(like, {parts, count, depth}, ScalarType::Half),
      new_tensor(like, {2, count})};
  packed.parts.data = packed.parts_data.data_ptr();
  packed.inverse = data_of<float>(packed.numbers);
  packed.lengths = packed.inverse + count;
  pack<false>(
      codes.arithmetic, codes.heads, x, begin, end, packed.parts_data.data_ptr(), count, depth, packed.inverse,
      codes.extent, device);
  return packed;
}

}  // namespace dlvae
