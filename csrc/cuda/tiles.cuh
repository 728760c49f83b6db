// Products of a tile of rows with tiles of codes on tensor cores, for all searches.
//
// A block of 8 warps holds the sums of 128 rows and 128 codes in registers, 64 rows and 32 codes per warp. Both factors
// are copied to shared memory in steps of DEPTH features, several steps ahead. Rows that fit stay there for all codes.
#pragma once

#include "device.cuh"
#include "parts.h"

namespace dlvae {

// LEAST_TERM = 1 omits low * low, which is below 2^-22 of high * high.
template <class Half_, int PARTS_, int DEPTH_, int LEAST_TERM>
struct Tiles {
  using Half = Half_;
  static constexpr int PARTS = PARTS_, DEPTH = DEPTH_;
  static constexpr int THREADS = 256, STAGES = 3;
  static constexpr int WARP_ROWS = 64, WARP_CODES = 32, WARPS_OF_CODES = TILE / WARP_CODES;
  static constexpr int UNITS = DEPTH / 8;            // units of 16 bytes in one row of a step
  static constexpr int STEP = PARTS * TILE * DEPTH;  // number of elements of a tile in one step
  // Every architecture from 8.0 on supports this size of a block's shared memory.
  static constexpr int SHARED = 96 << 10;
  static constexpr int MOST_RESIDENT = SHARED / (STEP * (int)sizeof(Half)) - STAGES;

  // The number of slots of shared memory for rows: one per step if the rows stay there, else one per stage.
  static constexpr __host__ __device__ int row_slots(int steps) { return steps <= MOST_RESIDENT ? steps : STAGES; }
  static int shared_bytes(int slots) { return (slots + STAGES) * STEP * (int)sizeof(Half); }

  // The sum of row row_of(i, h) and code code_of(j, e) is at [i][j][2 * h + e].
  using Sums = float[WARP_ROWS / 16][WARP_CODES / 8][4];
  static __device__ int first_row() { return warp_index() / WARPS_OF_CODES * WARP_ROWS; }
  static __device__ int first_code() { return warp_index() % WARPS_OF_CODES * WARP_CODES; }
  static __device__ int row_of(int i, int h) { return first_row() + i * 16 + h * 8 + lane_index() / 4; }
  static __device__ int code_of(int j, int e) { return first_code() + j * 8 + lane_index() % 4 * 2 + e; }

  // Calls use(tile, sums) for each tile of codes in [begin, end) and the tile `row_tile` of rows. Sums are in packed
  // units.
  template <class Use>
  static __device__ void run(
      const Parts& rows, int64_t row_tile, const Parts& codes, int begin, int end, char* shared, const Use& use) {
    const int steps = rows.depth / DEPTH;
    run_turns(rows, row_tile, codes, begin, 0, steps, (end - begin) * steps, row_slots(steps), shared, use);
  }

  // Calls use(sums) for one tile of rows and one tile of codes, over the features of steps [first, last).
  template <class Use>
  static __device__ void run_steps(
      const Parts& rows, int64_t row_tile, const Parts& codes, int code_tile, int first, int last, char* shared,
      const Use& use) {
    run_turns(
        rows, row_tile, codes, code_tile, first, last - first, last - first, STAGES, shared,
        [&](int, const Sums& sums) { use(sums); });
  }

 private:
  // Turn t processes step first + t % steps of tile begin + t / steps.
  template <class Use>
  static __device__ void run_turns(
      const Parts& rows, int64_t row_tile, const Parts& codes, int begin, int first, int steps, int turns, int slots,
      char* shared, const Use& use) {
    const bool are_resident = slots == steps;
    Half* const row_slots_at = reinterpret_cast<Half*>(shared);
    Half* const code_slots_at = row_slots_at + slots * STEP;
    const auto row_slot = [&](int turn) { return row_slots_at + turn % slots * STEP; };
    const auto code_slot = [&](int turn) { return code_slots_at + turn % STAGES * STEP; };
    const auto load = [&](int turn) {
      if (turn < turns) {
        if (!are_resident || turn < steps) copy(rows, row_tile, first + turn % steps, row_slot(turn));
        copy(codes, begin + turn / steps, first + turn % steps, code_slot(turn));
      }
      cp_async_commit();
    };
    for (int turn = 0; turn < STAGES - 1; ++turn) load(turn);
    Sums sums = {};
    for (int turn = 0; turn < turns; ++turn) {
      cp_async_wait<STAGES - 2>();
      // All threads see the data of this turn, and have finished reading the slot that is loaded next.
      __syncthreads();
      load(turn + STAGES - 1);
      multiply(row_slot(turn), code_slot(turn), sums);
      if (turn % steps != steps - 1) continue;
      use(begin + turn / steps, sums);
      clear(sums);
    }
    cp_async_wait<0>();
    __syncthreads();
  }

  // Returns where 16 bytes of a row are stored: eight rows that are read together must not conflict in the banks.
  static __device__ int place(int row, int unit) {
    constexpr int ROWS_OF_LINE = 8 / UNITS;
    return (row * UNITS + (unit ^ (row / ROWS_OF_LINE % UNITS))) * 8;
  }

  static __device__ void copy(const Parts& from, int64_t tile, int step, Half* to) {
    for (int part = 0; part < PARTS; ++part) {
      const Half* source = static_cast<const Half*>(from.data) + (part * from.count + tile * TILE) * from.depth;
      for (int i = threadIdx.x; i < TILE * UNITS; i += THREADS) {
        const int row = i / UNITS, unit = i % UNITS;
        cp_async16(
            to + part * TILE * DEPTH + place(row, unit), source + (int64_t)row * from.depth + step * DEPTH + unit * 8,
            16);
      }
    }
  }

  static __device__ void multiply(const Half* rows, const Half* codes, Sums& sums) {
#pragma unroll
    for (int unit = 0; unit < UNITS; unit += 2) {
      uint32_t row[PARTS][WARP_ROWS / 16][4], code[PARTS][WARP_CODES / 8][2];
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
#pragma unroll
        for (int i = 0; i < WARP_ROWS / 16; ++i)
          ldmatrix_x4(
              row[part][i],
              rows + part * TILE * DEPTH + place(first_row() + i * 16 + lane_index() % 16, unit + lane_index() / 16));
        // Loads two fragments at once, of 8 codes each.
#pragma unroll
        for (int j = 0; j < WARP_CODES / 8; j += 2) {
          uint32_t both[4];
          ldmatrix_x4(
              both,
              codes + part * TILE * DEPTH +
                  place(first_code() + j * 8 + lane_index() % 8 + lane_index() / 16 * 8, unit + lane_index() / 8 % 2));
          code[part][j][0] = both[0], code[part][j][1] = both[1];
          code[part][j + 1][0] = both[2], code[part][j + 1][1] = both[3];
        }
      }
      // The smallest products come first: low * low, low * high, high * low, high * high. With one term there is only
      // the last.
#pragma unroll
      for (int term = PARTS == 1 ? 3 : LEAST_TERM; term < 4; ++term) {
        const int of_row = term < 2 ? PARTS - 1 : 0, of_code = term % 2 == 0 ? PARTS - 1 : 0;
#pragma unroll
        for (int i = 0; i < WARP_ROWS / 16; ++i)
#pragma unroll
          for (int j = 0; j < WARP_CODES / 8; ++j) mma_m16n8k16<Half>(sums[i][j], row[of_row][i], code[of_code][j]);
      }
    }
  }

  static __device__ void clear(Sums& sums) {
#pragma unroll
    for (int i = 0; i < WARP_ROWS / 16; ++i)
#pragma unroll
      for (int j = 0; j < WARP_CODES / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[i][j][e] = 0;
  }
};

// Calls f(Tiles<...>{}) with the tiles for the arithmetic and the depth.
template <int LEAST_TERM, class F>
void with_tiles(Arithmetic arithmetic, int depth, const F& f) {
  const auto of_depth = [&](auto half, auto parts) {
    using Half = decltype(half);
    constexpr int PARTS = decltype(parts)::value;
    if (depth == 16) {
      f(Tiles<Half, PARTS, 16, LEAST_TERM>{});
    } else {
      f(Tiles<Half, PARTS, 32, LEAST_TERM>{});
    }
  };
  switch (arithmetic) {
    case Arithmetic::split: return of_depth(__half{}, std::integral_constant<int, 2>{});
    case Arithmetic::float16: return of_depth(__half{}, std::integral_constant<int, 1>{});
    case Arithmetic::bfloat16: return of_depth(__nv_bfloat16{}, std::integral_constant<int, 1>{});
  }
}

}  // namespace dlvae
