#pragma once

#include "simd.h"

namespace {

// Returns exp(v) for v <= 88 to about 1 ulp. The result is 0 below the smallest normal number; NaN stays NaN.
DLVAE_INLINE Floats exponential(Floats v) {
  const Floats smallest = fill(-87.33654f);
  const Floats x = larger(smallest, v);
  // v = n log 2 + r; log 2 is split in two terms, and n times the first is exact.
  const Floats shifted = x * 1.44269504f + 0x1.8p23f;
  const Floats n = shifted - 0x1.8p23f;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  // exp(r) for |r| <= log(2) / 2 by its Taylor series; the next term is below 2^-27.
  Floats p = fill(1.98412698e-4f);
  p = p * r + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = (p * r) * r + r + 1.0f;
  const Floats result = (Floats)((Ints)p + ((Ints)shifted << 23));
  return v < smallest ? Floats{} : result;
}

}  // namespace
