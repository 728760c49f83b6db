#include "../operations.h"
#include "../rotation.h"
#include "launch.h"
#include "rows_cuda.cuh"

namespace dlvae {
namespace {

// Writes the gradient of x for 32 rows. Their features pass through shared memory three times: for the norms, for the
// products, and for the result. Each warp computes the sums of its rows.
__global__ void __launch_bounds__(RowBlock::THREADS) rotate_kernel(Rows grad, Rows x, Rows q, Rows grad_x) {
  __shared__ int64_t offsets[4][RowBlock::ROWS];
  __shared__ RowBlock::Tile grads, sources, targets;
  constexpr int OWN = RowBlock::ROWS_OF_WARP;
  const int64_t first = (int64_t)blockIdx.x * RowBlock::ROWS;
  const RowBlock of_grad(grad, first, x.count, offsets[0]), of_x(x, first, x.count, offsets[1]);
  const RowBlock of_q(q, first, x.count, offsets[2]), to(grad_x, first, x.count, offsets[3]);
  const int lane = lane_index();
  // Calls f(i, row) for row i of this warp, once for every 32 features, of which each lane has one, and then `after`.
  const auto for_features = [&](bool reads_grad, const auto& f, const auto& after) {
    for (int64_t feature = 0; feature < x.features; feature += RowBlock::FEATURES) {
      __syncthreads();
      if (reads_grad) of_grad.load(feature, grads);
      of_x.load(feature, sources);
      of_q.load(feature, targets);
      __syncthreads();
#pragma unroll
      for (int i = 0; i < OWN; ++i) {
        const int row = warp_index() + i * RowBlock::WARPS;
        if (row < of_x.count && feature + lane < x.features) f(i, row);
      }
      after(feature);
    }
  };
  const auto nothing = [](int64_t) {};

  float x_squares[OWN] = {}, q_squares[OWN] = {}, s_squares[OWN] = {}, grad_s[OWN] = {}, grad_t[OWN] = {};
  for_features(
      false,
      [&](int i, int row) {
        x_squares[i] += sources[row][lane] * sources[row][lane];
        q_squares[i] += targets[row][lane] * targets[row][lane];
      },
      nothing);
  const auto sum = [](float value) { return warp_reduce(value, Sum{}); };
  Rotation rotations[OWN];
#pragma unroll
  for (int i = 0; i < OWN; ++i) rotations[i] = Rotation(sum(x_squares[i]), sum(q_squares[i]));
  for_features(
      true,
      [&](int i, int row) {
        const float s = rotations[i].s(sources[row][lane], targets[row][lane]);
        s_squares[i] += s * s;
        grad_s[i] += grads[row][lane] * s;
        grad_t[i] += grads[row][lane] * (targets[row][lane] * rotations[i].per_q);
      },
      nothing);
#pragma unroll
  for (int i = 0; i < OWN; ++i) rotations[i].set_products(sum(s_squares[i]), sum(grad_s[i]), sum(grad_t[i]));
  for_features(
      true,
      [&](int i, int row) {
        grads[row][lane] = rotations[i](grads[row][lane], sources[row][lane], targets[row][lane]);
      },
      [&](int64_t feature) {
        __syncthreads();
        to.store(feature, grads);
      });
}

}  // namespace

Tensor rotation_trick_bwd(const Tensor& grad, const Tensor& x, const Tensor& q) {
  const Device device(x);
  STD_TORCH_CHECK(
      shape_of(grad) == shape_of(x) && shape_of(q) == shape_of(x), "expected grad and q of the shape of x, ",
      shape_text(x), ", got ", shape_text(grad), " and ", shape_text(q));
  const Rows rows = rows_of("x", x);
  const Tensor grad_x = new_like(x);
  launch(
      "rotate", rotate_kernel, RowBlock::blocks_of(rows.count), RowBlock::THREADS, 0, device.stream,
      rows_of("grad", grad), rows, rows_of("q", q), rows_of("grad_x", grad_x));
  return grad_x;
}

}  // namespace dlvae
