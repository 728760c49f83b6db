// Rows and codes in the form that tensor cores read: in half precision, padded with zeros to whole tiles.
//
// A float32 number is the sum of a high and a low float16 term, to 22 bits. Products of two such numbers are summed as
// high * low + low * high + high * high, for `products` with low * low before them. What the terms omit is below 2^-20
// of |x| |c| (docs/numerics.md, 4.1). Both factors are scaled by
// powers of two, so that all terms stay in the range of float16: the codebook by one factor, each row by its own.
// Half-precision inputs are used as they are: their products are exact in float32.
#pragma once

#include "launch.h"

namespace dlvae {

constexpr int TILE = 128;  // number of rows or codes in a tile
// The half norm of a code that is never the nearest: padding, or a code that holds NaN. Sums with it are finite.
constexpr float FAR = 3e38f;
// Sums over longer rows might overflow.
constexpr float LONG = 0x1p100f;

enum class Arithmetic { split, float16, bfloat16 };
Arithmetic arithmetic_of(const Rows& x, const Rows& codes);

struct Parts {
  const void* data;  // [terms][count][depth]
  int64_t count;     // number of rows or codes, padded to whole tiles
  int depth;         // number of features, padded to whole steps
};

// A packed codebook, or those of all heads, one after another, each padded by itself. The tensors own the memory.
struct PackedCodes {
  Arithmetic arithmetic;
  int64_t heads;
  int64_t codes;  // K of all heads
  Parts parts;
  float* half_norms;  // [count]: |c|^2 / 2 of the scaled code; if at least FAR, the terms of the code are zeros
  // [heads][2]: the largest finite element; the largest length of a scaled finite code, at least 2^TOP.
  float* extent;
  Tensor parts_data, numbers, extent_data;
};
PackedCodes pack_codes(
    const Tensor& like, const Rows& codes, Arithmetic arithmetic, const Device& device, int64_t heads = 1);

struct PackedRows {
  Parts parts;
  // [count]: a sum of products times `inverse` is the product of the row and a code, both in the scale of the codebook.
  float* inverse;
  // [count]: |x| in the same scale; infinite, with terms of zero, if that is at least LONG or not finite.
  float* lengths;
  Tensor parts_data, numbers;
};
// Packs rows [begin, end) of each head of x, which is ordered by head, for products with the packed codes.
PackedRows pack_rows(
    const Tensor& like, const Rows& x, int64_t begin, int64_t end, const PackedCodes& codes, const Device& device);

// Returns the number of rows to process at a time, in whole tiles, if each uses `elements` of scratch memory.
int64_t rows_of_chunk(int64_t elements, const Device& device);

}  // namespace dlvae
