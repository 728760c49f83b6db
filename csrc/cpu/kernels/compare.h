// Comparisons of floats as bit masks, one bit per element, and functions built from them.
#pragma once

#include "rows_kernel.h"
#include "simd.h"

namespace {

// Returns one bit per element: whether the comparison `is` holds.
DLVAE_INLINE uint32_t bits_of(Ints is) {
#if defined(DLVAE_AVX512)
  return _mm512_movepi32_mask((__m512i)is);
#elif defined(DLVAE_AVX2)
  return (uint32_t)_mm256_movemask_ps((__m256)is);
#elif defined(__x86_64__)
  return (uint32_t)_mm_movemask_ps((__m128)is);
#else
  uint32_t bits = 0;
  for (int i = 0; i < WIDTH; ++i) bits |= (uint32_t)(is[i] & 1) << i;
  return bits;
#endif
}

DLVAE_INLINE uint32_t not_above(Floats a, Floats b) {
#if defined(DLVAE_AVX512)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LE_OQ);
#else
  return bits_of((Ints)(a <= b));
#endif
}

// Returns counts + 1 where a <= b, respectively a < b, else counts.
DLVAE_INLINE Ints count_not_above(Ints counts, Floats a, Floats b) {
#if defined(DLVAE_AVX512)
  const __mmask16 is = _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LE_OQ);
  return (Ints)_mm512_mask_sub_epi32((__m512i)counts, is, (__m512i)counts, _mm512_set1_epi32(-1));
#else
  return counts - (Ints)(a <= b);
#endif
}
DLVAE_INLINE Ints count_below(Ints counts, Floats a, Floats b) {
#if defined(DLVAE_AVX512)
  const __mmask16 is = _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ);
  return (Ints)_mm512_mask_sub_epi32((__m512i)counts, is, (__m512i)counts, _mm512_set1_epi32(-1));
#else
  return counts - (Ints)(a < b);
#endif
}

// The same for element `lane`, whose value is `a`: it counts where it comes before an element of b. Ties go to the
// lower place.
DLVAE_INLINE Ints count_before(Ints counts, Floats a, Floats b, int lane) {
#if defined(DLVAE_AVX512)
  const __mmask16 is_below = _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ);
  const __mmask16 is_equal = _mm512_mask_cmp_ps_mask((__mmask16)(0xfffe << lane), (__m512)a, (__m512)b, _CMP_EQ_OQ);
  const __mmask16 is = _kor_mask16(is_below, is_equal);
  return (Ints)_mm512_mask_sub_epi32((__m512i)counts, is, (__m512i)counts, _mm512_set1_epi32(-1));
#else
  return counts - ((Ints)(a < b) | ((Ints)(a == b) & (Ints)(counting() > lane)));
#endif
}

DLVAE_INLINE Floats magnitude(Floats v) { return (Floats)((Ints)v & 0x7fffffff); }

DLVAE_INLINE float highest(Floats v) { return -lowest(-v); }

// Converts floats to integers in the same order, and back.
DLVAE_INLINE int32_t ordered(float value) {
  const int32_t bits = (int32_t)as_bits(value);
  return bits ^ (bits >> 31 & 0x7fffffff);
}
DLVAE_INLINE float from_ordered(int32_t order) { return as_float((uint32_t)(order ^ (order >> 31 & 0x7fffffff))); }

// Returns how many of n scores are at most `bound`. The padding to a whole vector must be above the bound.
DLVAE_INLINE int64_t count_within(const float* scores, int64_t n, float bound) {
  const Floats limit = fill(bound);
#if defined(DLVAE_AVX512)
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += WIDTH) count += __builtin_popcount(not_above(load<Floats>(scores + i), limit));
  return count;
#else
  Ints counts{};
  for (int64_t i = 0; i < n; i += WIDTH) counts = count_not_above(counts, load<Floats>(scores + i), limit);
  int64_t count = 0;
  for (int i = 0; i < WIDTH; ++i) count += counts[i];
  return count;
#endif
}

// Appends those of n scores that are at most `bound`, with their places: `places`, or first, first + 1, ... without.
// Returns their number; may write up to one vector beyond them. Input and output may overlap.
template <bool HAS_PLACES>
DLVAE_INLINE int64_t keep_within(
    const float* scores, const int32_t* places, int32_t first, int64_t n, float bound, float* to, int32_t* to_places) {
  const Floats limit = fill(bound);
  int64_t kept = 0;
  for (int64_t i = 0; i < n; i += WIDTH) {
    const Floats score = load<Floats>(scores + i);
    uint32_t bits = not_above(score, limit);
    if (bits == 0) continue;
#if defined(DLVAE_AVX512)
    __m512i place;
    if constexpr (HAS_PLACES) {
      place = _mm512_loadu_si512(places + i);
    } else {
      const __m512i steps = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      place = _mm512_add_epi32(steps, _mm512_set1_epi32(first + (int32_t)i));
    }
    _mm512_storeu_ps(to + kept, _mm512_maskz_compress_ps((__mmask16)bits, (__m512)score));
    _mm512_storeu_si512(to_places + kept, _mm512_maskz_compress_epi32((__mmask16)bits, place));
    kept += __builtin_popcount(bits);
#else
    for (; bits != 0; bits &= bits - 1) {
      const int64_t j = i + __builtin_ctz(bits);
      to[kept] = scores[j];
      to_places[kept++] = HAS_PLACES ? places[j] : first + (int32_t)j;
    }
#endif
  }
  return kept;
}

}  // namespace
