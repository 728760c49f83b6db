// CUDA functions of a single thread.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "block.h"
#include "half.h"

using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;

inline int __float_as_int(float value) { return dlvae::emulator::bits_as<int>(value); }
inline unsigned __float_as_uint(float value) { return dlvae::emulator::bits_as<unsigned>(value); }
inline float __int_as_float(int bits) { return dlvae::emulator::bits_as<float>(bits); }
inline float __uint_as_float(unsigned bits) { return dlvae::emulator::bits_as<float>(bits); }
inline long long __double_as_longlong(double value) { return dlvae::emulator::bits_as<long long>(value); }
inline double __longlong_as_double(long long bits) { return dlvae::emulator::bits_as<double>(bits); }

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __ffsll(long long bits) { return __builtin_ffsll(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
inline int __clzll(long long bits) { return bits == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(bits)); }

// These are never contracted into a fused operation.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float a) { return std::exp(a); }
inline float __logf(float a) { return std::log(a); }
inline float rsqrtf(float a) { return 1 / std::sqrt(a); }

template <class T>
T __ldg(const T* from) {
  return *from;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

namespace dlvae::emulator {

// A type that does not take part in template argument deduction.
template <class T>
struct Same {
  using type = T;
};

template <class T, class F>
T change(T* at, const F& f) {
  const T old = *at;
  *at = f(old);
  return old;
}

}  // namespace dlvae::emulator

// Threads switch only where they wait, so that plain code is atomic.
template <class T>
T atomicAdd(T* at, typename dlvae::emulator::Same<T>::type value) {
  return dlvae::emulator::change(at, [=](T old) { return old + value; });
}
template <class T>
T atomicMax(T* at, typename dlvae::emulator::Same<T>::type value) {
  return dlvae::emulator::change(at, [=](T old) { return std::max(old, value); });
}
template <class T>
T atomicMin(T* at, typename dlvae::emulator::Same<T>::type value) {
  return dlvae::emulator::change(at, [=](T old) { return std::min(old, value); });
}
template <class T>
T atomicOr(T* at, typename dlvae::emulator::Same<T>::type value) {
  return dlvae::emulator::change(at, [=](T old) { return old | value; });
}
template <class T>
T atomicExch(T* at, typename dlvae::emulator::Same<T>::type value) {
  return dlvae::emulator::change(at, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* at, typename dlvae::emulator::Same<T>::type expected, typename dlvae::emulator::Same<T>::type value) {
  return dlvae::emulator::change(at, [=](T old) { return old == expected ? value : old; });
}
