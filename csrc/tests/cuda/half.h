// __half and __nv_bfloat16: their bits, and conversions that round to nearest, ties to even.
#pragma once

#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

namespace dlvae::emulator {

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

}  // namespace dlvae::emulator

inline float __half2float(__half value) {
  using dlvae::emulator::bits_as;
  const uint32_t sign = (value.bits & 0x8000u) << 16, rest = (value.bits & 0x7fffu) << 13;
  if (rest >= 0x0f800000) return bits_as<float>(sign | 0x7f800000 | rest);  // infinity or NaN
  if (rest >= 0x00800000) return bits_as<float>(sign | (rest + 0x38000000));
  const float small = bits_as<float>(0x38800000 | rest) - bits_as<float>(0x38800000);
  return bits_as<float>(sign | bits_as<uint32_t>(small));
}

inline __half __float2half_rn(float value) {
  using dlvae::emulator::bits_as;
  const uint32_t bits = bits_as<uint32_t>(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return {0x7fff};
  if (rest >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds beyond 65504
  // For a subnormal number, the addition shifts the digits into place and rounds them.
  const uint32_t half = rest < 0x38800000 ? bits_as<uint32_t>(bits_as<float>(rest) + 0.5f) - 0x3f000000
                                          : (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13;
  return {static_cast<uint16_t>(sign | half)};
}

inline float __bfloat162float(__nv_bfloat16 value) {
  return dlvae::emulator::bits_as<float>(static_cast<uint32_t>(value.bits) << 16);
}

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const uint32_t bits = dlvae::emulator::bits_as<uint32_t>(value);
  if (value != value) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
