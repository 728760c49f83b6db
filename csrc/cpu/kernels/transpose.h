// Transposition of a square of vectors.
#pragma once

#include "simd.h"

namespace {

// Exchanges element j of vector i with element i of vector j.
DLVAE_INLINE void transpose(Floats (&v)[WIDTH]) {
  Ints low;
  for (int i = 0; i < WIDTH; ++i) low[i] = i % 2 * WIDTH + i / 2;
  // Each step moves the highest bit of the vector's number to the lowest bit of the element's number, and vice versa.
  for (int step = WIDTH; step > 1; step /= 2) {
    Floats next[WIDTH];
    unroll<WIDTH / 2>([&](auto pair) {
      constexpr int i = decltype(pair)::value;
      next[2 * i] = shuffle(v[i], v[i + WIDTH / 2], low);
      next[2 * i + 1] = shuffle(v[i], v[i + WIDTH / 2], low + WIDTH / 2);
    });
    unroll<WIDTH>([&](auto i) { v[decltype(i)::value] = next[decltype(i)::value]; });
  }
}

}  // namespace
