#include "products.h"

#include "launch.h"
#include "parts.cuh"
#include "rows_cuda.cuh"
#include "tiles.cuh"

namespace dlvae {
namespace {

// The number of features in one chain of additions, along which the truncation errors of tensor cores add up.
constexpr int CHAIN = 1024;
constexpr int THREADS = 256;

struct Output {
  Affine affine;
  int64_t rows, codes;
  const float *inverse, *lengths, *half_norms, *extent;
  bool is_split;  // whether packing scaled the data
  float* data;
  int64_t ld;

  // Returns the product that belongs to a sum over terms.
  __device__ float product_of(float sum, int64_t row) const {
    const float unit = unit_of(extent, is_split && !affine.is_scaled);
    return sum * inverse[row] * unit * unit;
  }
  __device__ void put(int64_t row, int64_t code, float product) const {
    float& to = data[row * ld + code];
    const float start = affine.adds ? to : affine.start == nullptr ? 0 : affine.start[code];
    to = start + affine.sign * product;
  }
};

template <class Tiles>
__global__ void __launch_bounds__(Tiles::THREADS, 1)
    products_kernel(Parts rows, Parts codes, Output out, float* shares) {
  char* const shared = dynamic_shared<char>();
  // gridDim.y is at most 65535, so blockIdx.x numbers both kinds of tiles.
  const int row_tiles = (int)(rows.count / TILE), row_tile = blockIdx.x % row_tiles, code_tile = blockIdx.x / row_tiles;
  const int first = blockIdx.y * (CHAIN / Tiles::DEPTH), steps = rows.depth / Tiles::DEPTH;
  Tiles::run_steps(
      rows, row_tile, codes, code_tile, first, min(first + CHAIN / Tiles::DEPTH, steps), shared,
      [&](const typename Tiles::Sums& sums) {
#pragma unroll
        for (int i = 0; i < Tiles::WARP_ROWS / 16; ++i)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int64_t row = (int64_t)row_tile * TILE + Tiles::row_of(i, h);
            if (row >= out.rows) continue;
#pragma unroll
            for (int j = 0; j < Tiles::WARP_CODES / 8; ++j)
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                const int64_t code = (int64_t)code_tile * TILE + Tiles::code_of(j, e);
                if (code >= out.codes) continue;
                const float sum = sums[i][j][2 * h + e];
                if (shares == nullptr) {
                  out.put(row, code, out.product_of(sum, row));
                } else {
                  shares[(blockIdx.y * out.rows + row) * out.codes + code] = sum;
                }
              }
          }
      });
}

__global__ void add_shares_kernel(const float* shares, int count, Output out) {
  const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= out.rows * out.codes) return;
  float sum = 0;
  for (int share = 0; share < count; ++share) sum += shares[share * out.rows * out.codes + i];
  out.put(i / out.codes, i % out.codes, out.product_of(sum, i / out.codes));
}

// Computes products of rows and codes that the terms cannot hold. Such rows and codes are few: the blocks test all of
// them, without a list.
__global__ void __launch_bounds__(THREADS) repair_kernel(Rows x, int64_t begin, Rows codes, Output out) {
  const auto is_unfit = [&](int64_t row) { return !(out.lengths[row] < INFINITY); };
  const int64_t items = out.rows + out.codes;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const bool is_row = item < out.rows;
    if (is_row ? !is_unfit(item) : out.half_norms[item - out.rows] < FAR) continue;
    for (int64_t i = threadIdx.x; i < (is_row ? out.codes : out.rows); i += blockDim.x) {
      const int64_t row = is_row ? item : i, code = is_row ? i : item - out.rows;
      if (!is_row && is_unfit(row)) continue;
      const int64_t row_at = row_offset(x, begin + row), code_at = row_offset(codes, code);
      float sum = 0;
      for (int64_t d = 0; d < x.features; ++d)
        sum += load_element(x, row_at + d * x.stride) * load_element(codes, code_at + d * codes.stride);
      // A row or code with terms of zero has contributed nothing yet.
      out.data[row * out.ld + code] += out.affine.sign * sum;
    }
  }
}

Output output_of(
    int64_t rows, const PackedRows& x, const PackedCodes& codes, const Affine& affine, float* out, int64_t ld) {
  return {affine,       rows,
          codes.codes,  x.inverse,
          x.lengths,    codes.half_norms,
          codes.extent, codes.arithmetic == Arithmetic::split,
          out,          ld};
}

}  // namespace

PackedRows products(
    const Tensor& like, const Rows& x, int64_t begin, int64_t end, const PackedCodes& packed, const Affine& affine,
    float* out, int64_t ld, const Device& device) {
  const PackedRows rows = pack_rows(like, x, begin, end, packed, device);
  const Output output = output_of(end - begin, rows, packed, affine, out, ld);
  const int shares = (int)ceil_div(packed.parts.depth, CHAIN);
  const int64_t elements = output.rows * output.codes;
  const Tensor parts = new_tensor(like, {shares > 1 ? shares : 0, elements});
  float* const of_shares = shares > 1 ? data_of<float>(parts) : nullptr;
  with_tiles<0>(packed.arithmetic, packed.parts.depth, [&](auto tiles) {
    using Kind = decltype(tiles);
    const unsigned tiles_of_both = blocks(rows.parts.count / TILE * (packed.parts.count / TILE));
    launch(
        "products", products_kernel<Kind>, dim3(tiles_of_both, shares), Kind::THREADS, Kind::shared_bytes(Kind::STAGES),
        device.stream, rows.parts, packed.parts, output, of_shares);
  });
  if (shares > 1)
    launch(
        "add_shares", add_shares_kernel, blocks(ceil_div(elements, THREADS)), THREADS, 0, device.stream, of_shares,
        shares, output);
  return rows;
}

void repair_products(
    const Rows& x, int64_t begin, const PackedRows& rows, const Rows& codes, const PackedCodes& packed,
    const Affine& affine, float* out, int64_t ld, const Device& device) {
  const Output output = output_of(std::min(rows.parts.count, x.count - begin), rows, packed, affine, out, ld);
  const int64_t many = std::min<int64_t>(output.rows + output.codes, 4 * device.multiprocessors);
  launch("repair", repair_kernel, blocks(many), THREADS, 0, device.stream, x, begin, codes, output);
}

}  // namespace dlvae
