// Codes of a panel block (see wna16/panels.h) as the A fragments of the tensor core, without a conversion
// instruction: one mask takes a pair of codes out of a turned word and puts it into the mantissas of two
// floats.
//
//   bits of half a word     bfloat16   exponent . . . . 7 | 6 5 4 3 2 1 0 mantissa
//   4 bits, turned by 4r                                      x x x x
//   3 bits, turned by 6 * (r / 2)                           x x x          rows g + 8 (r odd)
//                                                                 x x x    rows g
//   2 bits, turned by 4 * (r / 2)                           x x            rows g + 8
//                                                               x x        rows g
//
// A code whose lowest bit lies at bit p of the mantissa is worth one if the float's exponent says 2^(7 - p),
// so the float is base + code with base = 2^(7 - p): exact, and the same for all codes of a row. Codes lie
// high, so that the base is not much larger than they are, and two rows share a turn where the mantissa holds
// both. float16 has ten bits of mantissa, so there two rows of 4 bits share one as well: rows g + 8 lie four
// higher.
//
// The base comes off again in one of two ways:
//   exact   one instruction a pair takes base + zero off
//   bare    the code enters the product as it is, and what is too much, (base + zero) * sum(x), is taken off
//           the sum: a product of x with one constant gives it for all rows. In float16 the exponent of bare
//           codes is zero: subnormals, which have no base at all.
// 8-bit codes for bfloat16, which does not hold a base and 8 bits, are exact by way of float32.
#pragma once

#include <cstdint>
#include <type_traits>

#include "device/packed_math.cuh"

namespace qsun {

constexpr int kBlockSteps = 8;  // products of 16 columns in a block of 128
constexpr int kHalfSteps = 4;   // of half a block

// The words of one lane for half the steps of a row tile.
template <int kBits>
constexpr int kHalfWords = kBits;

template <typename T>
constexpr int kMantissaBits = std::is_same_v<T, __half> ? 10 : 7;
template <typename T>
constexpr uint32_t kExponentBias = std::is_same_v<T, __half> ? 15 : 127;

// The lowest bit of a code in the mantissa, for rows g (kHalf 0) and rows g + 8 (1).
template <typename T, int kBits, int kHalf>
constexpr int kCodeBit = kBits == 4 ? 2 + (std::is_same_v<T, __half> ? 4 * kHalf : 0)
                                    : (kBits == 3 ? 1 + 3 * kHalf : (kBits == 2 ? 3 + 2 * kHalf : 0));

// What lies under a code, in steps of the code.
template <typename T, int kBits, int kHalf>
constexpr int kCodeBase = 1 << (kMantissaBits<T> - kCodeBit<T, kBits, kHalf>);

// Bits lie in both halves of a word.
__host__ __device__ constexpr uint32_t twice(uint32_t bits) { return bits * 0x00010001u; }

__device__ __forceinline__ uint32_t turn_right(uint32_t word, int bits) {
  return bits == 0 ? word : word >> bits | word << (32 - bits);
}

// A word with the codes of pair `r` (0..3: rows g, g + 8, g, g + 8) of step `step` at kCodeBit. words: of
// half a block, `step` counts in it. `step` and `r` are constants after unrolling.
template <typename T, int kBits>
__device__ __forceinline__ uint32_t turned_word(const uint32_t (&words)[kHalfWords<kBits>], int step, int r) {
  if constexpr (kBits == 4) {
    return turn_right(words[step], std::is_same_v<T, __half> ? r / 2 * 8 : r * 4);
  } else if constexpr (kBits == 3) {
    // The fourth step lies in the four bits that three words of four 3-bit codes leave.
    constexpr uint32_t kOwn = twice(0x001e);
    uint32_t word = words[step % 3];
    if (step == 3) {
      word = (turn_right(words[0], 12) & kOwn) | (turn_right(words[1], 8) & kOwn << 4) |
             (turn_right(words[2], 4) & kOwn << 8);
    }
    return turn_right(word, r / 2 * 6);
  } else {
    static_assert(kBits == 2);
    return turn_right(words[step / 2], step % 2 * 8 + r / 2 * 4);
  }
}

// The codes of pair `r` of step `step` under the exponent field kExponent0 (rows g) or kExponent1 (rows g +
// 8).
template <typename T, int kBits, uint32_t kExponent0, uint32_t kExponent1>
__device__ __forceinline__ uint32_t code_pair(const uint32_t (&words)[kHalfWords<kBits>], int step, int r) {
  if constexpr (kBits == 8) {
    static_assert(std::is_same_v<T, __half> && kExponent0 == kExponent1);
    return permute_bytes(words[step * 2 + r / 2], kExponent0 << 2 | kExponent0 << 10,
                         r % 2 == 0 ? 0x4140 : 0x4342);
  } else {
    constexpr uint32_t kCodes = (1u << kBits) - 1u;
    const uint32_t word = turned_word<T, kBits>(words, step, r);
    return r % 2 == 0
               ? mask_or<twice(kCodes << kCodeBit<T, kBits, 0>), twice(kExponent0 << kMantissaBits<T>)>(word)
               : mask_or<twice(kCodes << kCodeBit<T, kBits, 1>), twice(kExponent1 << kMantissaBits<T>)>(word);
  }
}

// ---- exact

// The largest power of two by which exact (code - zero) of 8 bits is divided, so that the sum over a block of
// 128 columns cannot overflow where x * (code - zero) * scale does not. float16 sums of float16 products
// cannot.
template <typename T>
constexpr int kExactShift = std::is_same_v<T, __half> ? 0 : 8 + 7;

// What takes the base and the zero point off the codes of one row: built once a group from the zero point.
// kShift (8-bit codes in bfloat16 alone): the result is (code - zero) / 2^kShift.
template <typename T, int kBits, int kShift>
struct ZeroOffset {
  // float16, bfloat16: -(base + zero), twice. 8-bit codes in bfloat16: float32, divided by 2^kShift.
  uint32_t bits;

  // half: 0 for rows g, 1 for rows g + 8
  __device__ __forceinline__ ZeroOffset(uint32_t zero, int half) {
    if constexpr (kBits == 8 && !std::is_same_v<T, __half>) {
      bits = (0x80000000u | (127u + 23u - kShift) << 23) | zero;
    } else {
      static_assert(kShift == 0);
      constexpr int kBit0 = kCodeBit<T, kBits, 0>, kBit1 = kCodeBit<T, kBits, 1>;
      constexpr uint32_t kOne = kExponentBias<T> + kMantissaBits<T>;  // the exponent whose steps are one
      constexpr uint32_t kSign = 0x8000u;
      bits = half == 0 ? twice(kSign | (kOne - kBit0) << kMantissaBits<T>) | zero * twice(1u << kBit0)
                       : twice(kSign | (kOne - kBit1) << kMantissaBits<T>) | zero * twice(1u << kBit1);
    }
  }
};

// (code - zero) / 2^kShift of pair `r` of step `step`: exact. one: see add_pairs().
template <typename T, int kBits, int kShift>
__device__ __forceinline__ uint32_t exact_pair(const uint32_t (&words)[kHalfWords<kBits>], int step, int r,
                                               ZeroOffset<T, kBits, kShift> offset,
                                               uint32_t one = kOnePair<T>) {
  if constexpr (kBits == 8 && !std::is_same_v<T, __half>) {
    // 0x4b000000 | code is 2^23 + code in float32. code - zero has 8 bits, which bfloat16 holds.
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
    constexpr uint32_t kOne = kExponentBias<T> + kMantissaBits<T>;
    return add_pairs<T>(
        code_pair<T, kBits, kOne - kCodeBit<T, kBits, 0>, kOne - kCodeBit<T, kBits, 1>>(words, step, r),
        offset.bits, one);
  }
}

// (code - zero) * scale of pair `r` of step `step`, rounded once. scale: twice that of the row.
template <typename T, int kBits>
__device__ __forceinline__ uint32_t scaled_pair(const uint32_t (&words)[kHalfWords<kBits>], int step, int r,
                                                ZeroOffset<T, kBits, 0> offset, uint32_t scale,
                                                uint32_t one = kOnePair<T>) {
  return mul_pairs<T>(exact_pair<T, kBits, 0>(words, step, r, offset, one), scale);
}

// ---- bare

// Whether a float holds base and code, and the base is small beside what a sum can lose: float16 would hold
// eight bits, but their zero point is a hundred times the code's rounding.
template <typename T, int kBits>
constexpr bool kHasBareCodes = kBits < 8;

// What stands for one: 2^-kBareShift. In bfloat16 it is small enough that 128 products of x with base + code
// (below 2^(8 - p)) cannot overflow where x does not; in float16 it is the subnormal that the place of the
// code makes it.
template <typename T, int kBits, int kHalf>
constexpr int kBareShift =
    std::is_same_v<T, __half> ? 24 - kCodeBit<T, kBits, kHalf> : 7 + 8 - kCodeBit<T, kBits, 0>;

// What lies under a bare code, in steps of the code.
template <typename T, int kBits, int kHalf>
constexpr int kBareBase = std::is_same_v<T, __half> ? 0 : kCodeBase<T, kBits, kHalf>;

// (base + code) / 2^kBareShift of pair `r` of step `step`.
template <typename T, int kBits>
__device__ __forceinline__ uint32_t bare_pair(const uint32_t (&words)[kHalfWords<kBits>], int step, int r) {
  if constexpr (std::is_same_v<T, __half>) {
    return code_pair<T, kBits, 0, 0>(words, step, r);
  } else {
    constexpr uint32_t kOne = kExponentBias<T> + kMantissaBits<T> - kBareShift<T, kBits, 0>;
    return code_pair<T, kBits, kOne - kCodeBit<T, kBits, 0>, kOne - kCodeBit<T, kBits, 1>>(words, step, r);
  }
}

// The bits of -count / 2^kBareShift, twice, 0 < count < 256.
template <typename T, int kBits, int kHalf>
__host__ __device__ constexpr uint32_t minus_bare(uint32_t count) {
  if (std::is_same_v<T, __half>) return twice(0x8000u | count << kCodeBit<T, kBits, kHalf>);
  uint32_t log2 = 0;
  while (count >> (log2 + 1) != 0) ++log2;
  const uint32_t exponent = kExponentBias<T> + log2 - kBareShift<T, kBits, kHalf>;
  return twice(0x8000u | exponent << kMantissaBits<T> | (count << (kMantissaBits<T> - log2) & 0x7fu));
}

}  // namespace qsun
