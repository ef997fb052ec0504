// Codes of a panel block (see wna16/panels.h) as the A fragments of the tensor core, without a conversion
// instruction: the bits of a code are put into the mantissa of a float whose steps are one, and its offset is
// taken off again, exactly.
//
//   float16    0x6400 | code  is 1024 + code           (steps of one up to 2047)
//   bfloat16   0x4300 | code  is  128 + code           (up to 255, so up to 7-bit codes)
//   float32    0x4b000000 | code  is  2^23 + code      (8-bit codes for bfloat16: code - zero has 8 bits,
//   which
//                                                       bfloat16 holds exactly)
#pragma once

#include <cstdint>
#include <type_traits>

#include "device/packed_math.cuh"

namespace qsun {

constexpr int kBlockSteps = 8;  // products of 16 columns in a block of 128

// The words of one lane for the 8 steps of a row tile. 3-bit codes: 4 words of low bits, then 2 of third
// bits.
template <int kBits>
constexpr int kLaneWords = kBits == 8   ? 16
                           : kBits == 4 ? 8
                           : kBits == 3 ? 6
                                        : 4;

// The largest power of two by which exact (code - zero) is divided, so that the sum over a block of 128
// columns cannot overflow where x * (code - zero) * scale does not. float16 sums of float16 products cannot.
template <typename T, int kBits>
constexpr int kExactShift = std::is_same_v<T, __half> ? 0 : kBits + 7;

// What takes the offset and the zero point off the codes of one row: built once a group from the zero point.
// kShift: the result is (code - zero) / 2^kShift.
template <typename T, int kBits, int kShift>
struct ZeroOffset {
  // float16, bfloat16: -(base + zero) / 2^kShift, twice. 8-bit codes in bfloat16: the float32 of the same.
  uint32_t bits;

  __device__ __forceinline__ explicit ZeroOffset(uint32_t zero) {
    if constexpr (std::is_same_v<T, __half>) {
      static_assert(kShift == 0);
      bits = 0xe400e400u | zero * 0x00010001u;
    } else if constexpr (kBits == 8) {
      bits = (0x80000000u | (127u + 23u - kShift) << 23) | zero;
    } else {
      bits = ((0x8000u | (127u + 7u - kShift) << 7) * 0x00010001u) | zero * 0x00010001u;
    }
  }
};

// The codes of pair `r` (0..3: rows g, g + 8, g, g + 8) of step `step`, as a float pair with its base still
// on. `step` and `r` are constants after unrolling.
template <typename T, int kBits>
__device__ __forceinline__ uint32_t based_pair(const uint32_t (&words)[kLaneWords<kBits>], int step, int r) {
  constexpr uint32_t kMagic = std::is_same_v<T, __half> ? 0x64006400u : 0x43004300u;
  if constexpr (kBits == 8) {
    static_assert(std::is_same_v<T, __half>);
    const uint32_t word = words[step * 2 + r / 2];
    return permute_bytes(word, 0x64646464u, r % 2 == 0 ? 0x4140 : 0x4342);
  } else if constexpr (kBits == 4) {
    return mask_or<0x000f000fu, kMagic>(words[step] >> (4 * r));
  } else {
    const uint32_t low = mask_or<0x00030003u, kMagic>(words[step / 2] >> (8 * (step % 2) + 2 * r));
    if constexpr (kBits == 2) {
      return low;
    } else {
      const int at = 4 * (step % 4) + r;  // of the third bit, which belongs at bit 2
      const uint32_t word = words[4 + step / 4];
      const uint32_t third = at >= 2 ? word >> (at - 2) : word << (2 - at);
      return (third & 0x00040004u) | low;
    }
  }
}

// (code - zero) / 2^kShift of pair `r` of step `step`: exact.
template <typename T, int kBits, int kShift>
__device__ __forceinline__ uint32_t exact_pair(const uint32_t (&words)[kLaneWords<kBits>], int step, int r,
                                               ZeroOffset<T, kBits, kShift> offset) {
  if constexpr (kBits == 8 && !std::is_same_v<T, __half>) {
    const uint32_t word = words[step * 2 + r / 2];
    constexpr float kFactor = 1.0f / (1u << kShift);
    const float base = __uint_as_float(offset.bits);
    const uint32_t selector = r % 2 == 0 ? 0x7540 : 0x7542;  // bytes of 0x4b000000 above one byte of the word
    const float low = __uint_as_float(permute_bytes(word, 0x4b000000u, selector + 0));
    const float high = __uint_as_float(permute_bytes(word, 0x4b000000u, selector + 1));
    const uint32_t low_bits = __float_as_uint(fmaf(low, kFactor, base));
    const uint32_t high_bits = __float_as_uint(fmaf(high, kFactor, base));
    return permute_bytes(low_bits, high_bits, 0x7632);  // the upper halves: the lower ones are zero
  } else {
    const uint32_t based = based_pair<T, kBits>(words, step, r);
    if constexpr (kShift == 0) {
      return add_pairs<T>(based, offset.bits);
    } else {
      constexpr uint32_t kFactor = ((127u - kShift) << 7) * 0x00010001u;  // 2^-kShift in bfloat16, twice
      return fma_pairs<T>(based, kFactor, offset.bits);
    }
  }
}

// (code - zero) * scale of pair `r` of step `step`, rounded once. scale: twice that of the row.
template <typename T, int kBits>
__device__ __forceinline__ uint32_t scaled_pair(const uint32_t (&words)[kLaneWords<kBits>], int step, int r,
                                                ZeroOffset<T, kBits, 0> offset, uint32_t scale) {
  return mul_pairs<T>(exact_pair<T, kBits, 0>(words, step, r, offset), scale);
}

}  // namespace qsun
