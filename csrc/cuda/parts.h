// Rows and codes as tensor cores take them: in half precision, padded with zeros to whole tiles.
//
// A float32 number is the sum of two float16 ones, high and low, to 22 bits. Products of two such are summed as
// high * low + low * high + high * high; what is left out is below 2^-20 of them. So that no part falls out of the
// range of float16, both factors are scaled by powers of two: the codebook by one, each row by its own. Half-precision
// numbers are taken as they are: their products are exact in float32.
#pragma once

#include "launch.h"

namespace dlvae {

constexpr int TILE = 128;  // rows or codes of one tile
// The half norm of what can never be nearest: padding, or a code that holds NaN. Sums with it are finite.
constexpr float FAR = 3e38f;
// Rows so long that sums over them might be no number.
constexpr float LONG = 0x1p100f;

enum class Arithmetic { split, float16, bfloat16 };
Arithmetic arithmetic_of(const Rows& x, const Rows& codes);

struct Parts {
  const void* data;  // [parts][count][depth]
  int64_t count;     // rows or codes, in whole tiles
  int depth;         // features, in whole steps
};

// The tensors hold the memory.
struct PackedCodes {
  Arithmetic arithmetic;
  int64_t codes;  // K
  Parts parts;
  float* half_norms;  // [count]: |c|^2 / 2 of the scaled code; from FAR on its parts are zeros
  // [2]: the largest finite element; and the largest length of a scaled code that is finite, or 2^TOP.
  float* extent;
  Tensor parts_data, numbers, extent_data;
};
PackedCodes pack_codes(const Tensor& like, const Rows& codes, Arithmetic arithmetic, const Device& device);

struct PackedRows {
  Parts parts;
  // A sum of products times `inverse` is the product of the row and a code, both scaled as the codebook is. [count]
  float* inverse;
  float* lengths;  // [count]: |x|, scaled so; infinite where that is LONG or not finite, and the parts are zeros
  Tensor parts_data, numbers;
};
// Rows [begin, end) of x for those codes.
PackedRows pack_rows(
    const Tensor& like, const Rows& x, int64_t begin, int64_t end, const PackedCodes& codes, const Device& device);

// How many rows to take at a time, in whole tiles, where each takes so many elements of scratch memory.
int64_t rows_of_chunk(int64_t elements, const Device& device);

}  // namespace dlvae
