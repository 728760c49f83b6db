// Conversion between rows of any strides and type and blocks of float32 rows.
#pragma once

#include "../../rows.h"
#include "simd.h"
#include "transpose.h"

namespace {

using dlvae::Rows;
using dlvae::Type;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

DLVAE_INLINE float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
DLVAE_INLINE uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

DLVAE_INLINE float to_float(float value) { return value; }
DLVAE_INLINE float to_float(BFloat16 value) { return as_float((uint32_t)value.bits << 16); }
DLVAE_INLINE float to_float(Float16 value) {
  const uint32_t sign = (uint32_t)(value.bits & 0x8000) << 16, rest = (uint32_t)(value.bits & 0x7fff) << 13;
  if (rest >= 0x0f800000) return as_float(sign | 0x7f800000 | rest);  // infinity or NaN
  if (rest >= 0x00800000) return as_float(sign | (rest + 0x38000000));
  return as_float(sign | as_bits(as_float(0x38800000 | rest) - as_float(0x38800000)));  // subnormal
}

DLVAE_INLINE void from_float(float value, float* to) { *to = value; }
DLVAE_INLINE void from_float(float value, BFloat16* to) {
  const uint32_t bits = as_bits(value);
  // Rounds to nearest, ties to even; NaN stays NaN.
  to->bits = value != value ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
DLVAE_INLINE void from_float(float value, Float16* to) {
  const uint32_t bits = as_bits(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) {
    to->bits = 0x7e00;
  } else if (rest >= 0x477ff000) {  // rounds beyond 65504
    to->bits = (uint16_t)(sign | 0x7c00);
  } else if (rest < 0x38800000) {  // subnormal: the addition shifts the digits into place and rounds them
    to->bits = (uint16_t)(sign | (as_bits(as_float(rest) + 0.5f) - 0x3f000000));
  } else {
    to->bits = (uint16_t)(sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
  }
}

template <class T>
DLVAE_INLINE void widen_row(const T* from, int64_t count, float* to) {
  int64_t d = 0;
#if defined(DLVAE_AVX512)
  if constexpr (sizeof(T) == 2) {
    for (; d + 16 <= count; d += 16) {
      const __m256i raw = _mm256_loadu_si256((const __m256i*)(from + d));
      if constexpr (__is_same(T, Float16)) {
        _mm512_storeu_ps(to + d, _mm512_cvtph_ps(raw));
      } else {
        _mm512_storeu_si512(to + d, _mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
      }
    }
  }
#endif
  for (; d < count; ++d) to[d] = to_float(from[d]);
}

// Calls f(first row of a run, number of rows, offset of the first row, stride of the rows) for rows [begin, end).
template <class F>
DLVAE_INLINE void for_runs(const Rows& rows, int64_t begin, int64_t end, const F& f) {
  const int last = rows.dims - 1;
  while (begin < end) {
    int64_t rest = begin, offset = 0;
    for (int i = last; i > 0; --i) {
      offset += rest % rows.sizes[i] * rows.strides[i];
      rest /= rows.sizes[i];
    }
    offset += rest * rows.strides[0];
    const int64_t left = last == 0 ? end - begin : rows.sizes[last] - begin % rows.sizes[last];
    const int64_t count = left < end - begin ? left : end - begin;
    f(begin, count, offset, rows.strides[last]);
    begin += count;
  }
}

// Transposes WIDTH columns of WIDTH elements, `stride` apart, into float32 rows.
template <class T>
DLVAE_INLINE void turn(const T* from, int64_t stride, float* to, int64_t ld) {
  Floats tile[WIDTH];
  unroll<WIDTH>([&](auto i) {
    constexpr int d = decltype(i)::value;
    if constexpr (sizeof(T) == sizeof(float)) {
      tile[d] = load<Floats>(from + d * stride);
    } else {
      float wide[WIDTH];
      widen_row(from + d * stride, WIDTH, wide);
      tile[d] = load<Floats>(wide);
    }
  });
  transpose(tile);
  unroll<WIDTH>([&](auto i) { store(to + decltype(i)::value * ld, tile[decltype(i)::value]); });
}

template <class T>
void load_rows_of(const Rows& rows, int64_t begin, int64_t end, float* to, int64_t ld) {
  for_runs(rows, begin, end, [&](int64_t first, int64_t count, int64_t offset, int64_t row_stride) {
    const T* from = (const T*)rows.data + offset;
    float* out = to + (first - begin) * ld;
    if (rows.stride == 1) {
      for (int64_t r = 0; r < count; ++r) widen_row(from + r * row_stride, rows.features, out + r * ld);
      return;
    }
    // The features of a row are not adjacent. Square tiles use whole cache lines on both sides.
    constexpr int64_t TILE = 16;
    for (int64_t r0 = 0; r0 < count; r0 += TILE) {
      const int64_t r1 = r0 + TILE < count ? r0 + TILE : count;
      for (int64_t d0 = 0; d0 < rows.features; d0 += TILE) {
        const int64_t d1 = d0 + TILE < rows.features ? d0 + TILE : rows.features;
        if (row_stride == 1 && r1 - r0 == TILE && d1 - d0 == TILE) {
          for (int64_t r = r0; r < r1; r += WIDTH)
            for (int64_t d = d0; d < d1; d += WIDTH)
              turn(from + r + d * rows.stride, rows.stride, out + r * ld + d, ld);
          continue;
        }
        for (int64_t d = d0; d < d1; ++d)
          for (int64_t r = r0; r < r1; ++r) out[r * ld + d] = to_float(from[r * row_stride + d * rows.stride]);
      }
    }
  });
}

template <class T>
void store_rows_of(const Rows& rows, int64_t begin, int64_t end, const float* source, int64_t ld) {
  for_runs(rows, begin, end, [&](int64_t first, int64_t count, int64_t offset, int64_t row_stride) {
    T* to = (T*)rows.data + offset;
    const float* from = source + (first - begin) * ld;
    if (rows.stride == 1) {
      for (int64_t r = 0; r < count; ++r)
        for (int64_t d = 0; d < rows.features; ++d) from_float(from[r * ld + d], to + r * row_stride + d);
      return;
    }
    constexpr int64_t TILE = 16;
    for (int64_t r0 = 0; r0 < count; r0 += TILE) {
      const int64_t r1 = r0 + TILE < count ? r0 + TILE : count;
      for (int64_t d0 = 0; d0 < rows.features; d0 += TILE) {
        const int64_t d1 = d0 + TILE < rows.features ? d0 + TILE : rows.features;
        if constexpr (sizeof(T) == sizeof(float)) {
          if (row_stride == 1 && r1 - r0 == TILE && d1 - d0 == TILE) {
            for (int64_t r = r0; r < r1; r += WIDTH)
              for (int64_t d = d0; d < d1; d += WIDTH)
                turn(from + r * ld + d, ld, to + r + d * rows.stride, rows.stride);
            continue;
          }
        }
        for (int64_t d = d0; d < d1; ++d)
          for (int64_t r = r0; r < r1; ++r) from_float(from[r * ld + d], to + r * row_stride + d * rows.stride);
      }
    }
  });
}

// Converts rows [begin, end) to float32 at to[., ld].
inline void load_rows(const Rows& rows, int64_t begin, int64_t end, float* to, int64_t ld) {
  switch (rows.type) {
    case Type::float32: return load_rows_of<float>(rows, begin, end, to, ld);
    case Type::bfloat16: return load_rows_of<BFloat16>(rows, begin, end, to, ld);
    case Type::float16: return load_rows_of<Float16>(rows, begin, end, to, ld);
  }
}

// Converts source[., ld] back to rows [begin, end).
inline void store_rows(const Rows& rows, int64_t begin, int64_t end, const float* source, int64_t ld) {
  switch (rows.type) {
    case Type::float32: return store_rows_of<float>(rows, begin, end, source, ld);
    case Type::bfloat16: return store_rows_of<BFloat16>(rows, begin, end, source, ld);
    case Type::float16: return store_rows_of<Float16>(rows, begin, end, source, ld);
  }
}

}  // namespace
