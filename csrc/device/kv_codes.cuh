// Values as codes of a low-bit KV cache: e4m3 numbers, bytes and nibbles.
#pragma once

#include <cstdint>

namespace qsun {

constexpr float kLargestE4m3 = 448.0f;
constexpr float kLargestInt8 = 127.0f;
constexpr float kLargestInt4 = 7.0f;

// The integer nearest to `value`, ties to even, in the low bits of the result (two's complement), plus
// `kBias` there. Added to 1.5 * 2^23 a float has its unit in the last bit; a conversion would take a slower
// pipe. |value| + kBias < 2^22.
template <int kBias = 0>
__device__ __forceinline__ uint32_t nearest_integer(float value) {
  static_assert(kBias % 2 == 0, "an odd bias would round ties to odd");
  return __float_as_uint(__fadd_rn(value, 12582912.0f + kBias));
}

// (low, high) as two e4m3 numbers in the low 16 bits, rounded to nearest even. What is too large for the
// format becomes +-448, NaN becomes 0x7f.
__device__ __forceinline__ uint32_t e4m3_pair(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  return codes;
#else
  const auto code = [](float value) -> uint32_t {
    constexpr uint32_t kInfinity = 0x7f800000, kSmallestNormal = 0x3c800000;  // 2^-6 in e4m3
    constexpr uint32_t kLargest = 0x7e, kNan = 0x7f;
    const uint32_t bits = __float_as_uint(value);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > kInfinity) return kNan;
    uint32_t rounded;
    if (magnitude < kSmallestNormal) {
      // Units of 2^-9: the last bit of 2^14 is worth that much.
      rounded = __float_as_uint(__fadd_rn(__uint_as_float(magnitude), 16384.0f)) - 0x46800000u;
    } else {
      // Three bits of the mantissa stay; the exponent's bias falls from 127 to 7.
      rounded = ((magnitude + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20) - (120u << 3);
    }
    return (rounded < kLargest ? rounded : kLargest) | (bits >> 24 & 0x80u);
  };
  return code(low) | code(high) << 8;
#endif
}

// Four values as e4m3 numbers, the first in the low byte.
__device__ __forceinline__ uint32_t e4m3_word(const float* values) {
  return e4m3_pair(values[0], values[1]) | e4m3_pair(values[2], values[3]) << 16;
}

// Four values of at most 127 as bytes, the first in the low one.
__device__ __forceinline__ uint32_t int8_word(const float* values) {
  const uint32_t first = __byte_perm(nearest_integer(values[0]), nearest_integer(values[1]), 0x0040);
  const uint32_t second = __byte_perm(nearest_integer(values[2]), nearest_integer(values[3]), 0x0040);
  return __byte_perm(first, second, 0x5410);
}

// Four values of at most 7 as nibbles of code + 8, the first in the lowest; 16 bits.
__device__ __forceinline__ uint32_t int4_half_word(const float* values) {
  uint32_t nibbles = 0;
#pragma unroll
  for (int i = 3; i >= 0; --i) nibbles = nibbles << 4 | (nearest_integer<8>(values[i]) & 15u);
  return nibbles;
}

}  // namespace qsun
