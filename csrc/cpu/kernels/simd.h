// Vectors of the instruction set that this translation unit is compiled for, and the operations that kernels use.
//
// Everything under kernels/ is compiled once for each instruction set. It is in an anonymous namespace and uses no
// standard containers or algorithms, because the linker keeps one copy of an inline function, possibly one that this
// processor cannot execute.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
// The intrinsics for undefined registers read uninitialised variables on purpose.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#define DLVAE_INLINE inline __attribute__((always_inline))

namespace {

#if defined(DLVAE_AVX512)
constexpr int WIDTH = 16;
// The number of rows in one block of accumulators, beside two vectors of codes.
constexpr int ROWS = 8;
#elif defined(DLVAE_AVX2)
constexpr int WIDTH = 8;
constexpr int ROWS = 4;
#else
constexpr int WIDTH = 4;
constexpr int ROWS = 4;
#endif
// The number of codes in a panel: two vectors.
constexpr int PANEL = 2 * WIDTH;

typedef float Floats __attribute__((vector_size(WIDTH * 4)));
typedef int32_t Ints __attribute__((vector_size(WIDTH * 4)));
typedef double Doubles __attribute__((vector_size(WIDTH * 4)));
typedef float Half __attribute__((vector_size(WIDTH * 2)));  // as many floats as Doubles has elements

template <int I>
struct Constant {
  static constexpr int value = I;
};

// Calls f(Constant<0>), ..., f(Constant<N - 1>): an unrolled loop, whose arrays the compiler keeps in registers.
template <int N, int I = 0, class F>
DLVAE_INLINE void unroll(const F& f) {
  if constexpr (I < N) {
    f(Constant<I>{});
    unroll<N, I + 1>(f);
  }
}

template <class V, class S>
DLVAE_INLINE V load(const S* from) {
  V v;
  memcpy(&v, from, sizeof(V));
  return v;
}

// Loads the first n < WIDTH elements, and zeros beyond.
DLVAE_INLINE Floats load_first(const float* from, int64_t n) {
#if defined(DLVAE_AVX512)
  return (Floats)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), from);
#elif defined(DLVAE_AVX2)
  Ints places;
  for (int i = 0; i < WIDTH; ++i) places[i] = i;
  return (Floats)_mm256_maskload_ps(from, (__m256i)(places < (int32_t)n));
#else
  Floats v{};
  for (int i = 0; i < WIDTH; ++i)
    if (i < n) v[i] = from[i];
  return v;
#endif
}

template <class V, class S>
DLVAE_INLINE void store(S* to, V v) {
  memcpy(to, &v, sizeof(V));
}

DLVAE_INLINE Floats fill(float value) { return value - Floats{}; }
DLVAE_INLINE Ints fill(int32_t value) { return value - Ints{}; }

DLVAE_INLINE Floats smaller(Floats a, Floats b) {
#if defined(DLVAE_AVX512)
  return _mm512_min_ps(a, b);
#elif defined(DLVAE_AVX2)
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}
DLVAE_INLINE Floats larger(Floats a, Floats b) {
#if defined(DLVAE_AVX512)
  return _mm512_max_ps(a, b);
#elif defined(DLVAE_AVX2)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
DLVAE_INLINE Ints smaller(Ints a, Ints b) {
#if defined(DLVAE_AVX512)
  return (Ints)_mm512_min_epi32((__m512i)a, (__m512i)b);
#else
  return a < b ? a : b;
#endif
}
DLVAE_INLINE Ints larger(Ints a, Ints b) {
#if defined(DLVAE_AVX512)
  return (Ints)_mm512_max_epi32((__m512i)a, (__m512i)b);
#else
  return a > b ? a : b;
#endif
}

// Returns 0, 1, 2, ...
DLVAE_INLINE Ints counting() {
  Ints v;
  for (int i = 0; i < WIDTH; ++i) v[i] = i;
  return v;
}

// Selects elements of v by index; or of a and b, where indices from WIDTH on select from b.
template <class V>
DLVAE_INLINE V shuffle(V v, Ints places) {
#if defined(__clang__)
  V out;
  for (int i = 0; i < WIDTH; ++i) out[i] = v[places[i] % WIDTH];
  return out;
#else
  return __builtin_shuffle(v, places);
#endif
}
template <class V>
DLVAE_INLINE V shuffle(V a, V b, Ints places) {
#if defined(__clang__)
  V out;
  for (int i = 0; i < WIDTH; ++i) out[i] = places[i] < WIDTH ? a[places[i]] : b[places[i] - WIDTH];
  return out;
#else
  return __builtin_shuffle(a, b, places);
#endif
}

template <class V>
DLVAE_INLINE auto lowest(V v) {
  unroll<4>([&](auto i) {
    constexpr int step = 1 << decltype(i)::value;
    if constexpr (step < WIDTH) v = smaller(v, shuffle(v, counting() ^ step));
  });
  return v[0];
}

// Whether any lane of a comparison is true.
DLVAE_INLINE bool any(Ints mask) {
#if defined(DLVAE_AVX512)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(DLVAE_AVX2)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  return lowest(mask) != 0;
#endif
}

DLVAE_INLINE float total(Floats v) {
  unroll<4>([&](auto i) {
    constexpr int step = 1 << decltype(i)::value;
    if constexpr (step < WIDTH) v += shuffle(v, counting() ^ step);
  });
  return v[0];
}

// Adds halves, which makes the chain of dependent additions short.
DLVAE_INLINE double total(Doubles v) {
  double parts[WIDTH / 2];
  store(parts, v);
  unroll<3>([&](auto i) {
    constexpr int half = WIDTH / 4 >> decltype(i)::value;
    unroll<half>([&](auto j) { parts[decltype(j)::value] += parts[decltype(j)::value + half]; });
  });
  return parts[0];
}

DLVAE_INLINE Doubles widen(const float* from) { return __builtin_convertvector(load<Half>(from), Doubles); }

}  // namespace
